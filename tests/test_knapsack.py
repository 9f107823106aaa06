"""One option of every menu under one budget, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trimoe.methods.low_rank.knapsack import cheapest_losses

Menus = list[tuple[list[int], list[float]]]


def value(menus: Menus, chosen: list[int] | tuple[int, ...]) -> tuple[int, float]:
    return sum(m[0][c] for m, c in zip(menus, chosen, strict=True)), sum(m[1][c] for m, c in zip(menus, chosen, strict=True))


def random_menus(generator: np.random.Generator, groups: int, options: int) -> Menus:
    """Costs rise, losses fall; not convex in general."""
    menus = []
    for _ in range(groups):
        costs = np.cumsum(generator.integers(1, 9, options)) - 1
        losses = np.sort(generator.random(options))[::-1]
        menus.append((costs.tolist(), losses.tolist()))
    return menus


@pytest.mark.parametrize("seed", range(20))
def test_near_the_best_of_all_choices_and_never_over_budget(seed: int) -> None:
    generator = np.random.default_rng(seed)
    menus = random_menus(generator, 5, 4)
    least = sum(costs[0] for costs, _ in menus)
    for budget in range(least, least + 60, 3):
        cost, loss = value(menus, cheapest_losses(menus, budget))
        assert cost <= budget
        every = (value(menus, choice) for choice in itertools.product(range(4), repeat=5))
        best = min(found for spent, found in every if spent <= budget)
        # the relaxation is broken at one step only, so no more than one step's gain is lost
        assert loss <= best + max(losses[0] - losses[-1] for _, losses in menus) + 1e-12


def test_exact_where_the_budget_ends_between_two_steps() -> None:
    menus: Menus = [([0, 2, 4], [9.0, 3.0, 1.0]), ([0, 3, 6], [9.0, 6.0, 5.0])]  # gains per cost: 3, 1 and 1, 1/3
    assert cheapest_losses(menus, 2) == [1, 0]
    assert cheapest_losses(menus, 4) == [2, 0]
    assert cheapest_losses(menus, 7) == [2, 1]
    assert cheapest_losses(menus, 10) == [2, 2]


def test_a_hull_jump_that_does_not_fit_is_filled_with_what_does() -> None:
    menus: Menus = [([0, 4, 10], [10.0, 9.0, 0.0])]  # the hull jumps from 0 to 10; with 5 to spend the middle is still better
    assert cheapest_losses(menus, 5) == [1]


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="more than the budget of 3"):
        cheapest_losses([([4, 5], [1.0, 0.0])], 3)
