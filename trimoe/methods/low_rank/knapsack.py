"""Choosing one option from each of very many menus under one budget, near-exactly and fast (METHODS: budgets)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def cheapest_losses(menus: Sequence[tuple[Sequence[int], Sequence[float]]], budget: int) -> list[int]:
    """One option of each menu (costs rising, losses), least total loss within `budget`: for tens of thousands of menus.

    Options on a menu's lower convex hull are taken in the order of what they gain per unit of cost, which is optimal whenever the
    budget ends between two such steps; what is left over then buys single upgrades that still fit.
    """
    chosen = [0] * len(menus)
    left = budget - sum(costs[0] for costs, _ in menus)
    if left < 0:
        raise ValueError(f"The cheapest options cost {budget - left}, more than the budget of {budget}.")
    steps = []
    for group, (costs, losses) in enumerate(menus):
        hull = [0]
        for option in range(1, len(costs)):
            while len(hull) > 1 and _slope(costs, losses, hull[-2], hull[-1]) <= _slope(costs, losses, hull[-1], option):
                hull.pop()
            hull.append(option)
        steps += [(_slope(costs, losses, a, b), group, a, b) for a, b in pairwise(hull)]
    stopped = set()
    for _, group, a, b in sorted(steps, key=lambda step: (-step[0], step[1])):
        cost = menus[group][0][b] - menus[group][0][a]
        if group in stopped or cost > left:
            stopped.add(group)
            continue
        chosen[group], left = b, left - cost
    for group in sorted(range(len(menus)), key=lambda g: -menus[g][1][chosen[g]]):
        costs = menus[group][0]
        better = [option for option in range(chosen[group] + 1, len(costs)) if costs[option] - costs[chosen[group]] <= left]
        if better:
            left -= costs[better[-1]] - costs[chosen[group]]
            chosen[group] = better[-1]
    return chosen


def _slope(costs: Sequence[int], losses: Sequence[float], a: int, b: int) -> float:
    return (losses[a] - losses[b]) / (costs[b] - costs[a])
