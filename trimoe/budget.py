"""How many where: one total shared out over layers, experts and ranks.

`counts` are experts a layer drops (MoE-I2, https://arxiv.org/abs/2411.01016, section 3.1); ranks are those of its
section 3.2. Everything here is arithmetic on numbers already measured.

Shapes: E experts of a layer, L layers, B breakpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, isotonic_regression, milp
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROUNDING = 1e-9  # shares this close to a whole number are that number


def uniform_counts(sizes: Sequence[int], total: int, *, floors: Sequence[int], step: Sequence[int]) -> list[int]:
    """Drop the same fraction of every layer's experts, `total` in all.

    Layer i has `sizes[i]` experts, keeps at least `floors[i]`, and drops a multiple of `step[i]` (the number of its
    router groups, else 1). Largest remainder decides who rounds up; ties go to the later layers, whose loss passes
    through fewer layers. Raises ValueError where `total` cannot be met.
    """
    caps_L = _caps(sizes, total, floors, step)
    share_L = _fill(np.asarray(sizes, dtype=np.float64), np.zeros(len(sizes)), caps_L, total)
    return _round_counts(share_L, caps_L, total, step)


def importance_counts(
    importance: Sequence[float], sizes: Sequence[int], total: int, *, floors: Sequence[int], step: Sequence[int]
) -> list[int]:
    """Drop in proportion to 1 / importance, so that important layers lose fewer; arguments as in `uniform_counts`.

    What a full layer cannot take goes to the others in the same proportion. Layers of no importance (zero or less)
    are emptied to their floors before any other gives an expert, layers of infinite importance give theirs last.
    """
    caps_L = _caps(sizes, total, floors, step)
    importance_L = np.asarray(importance, dtype=np.float64)
    if np.isnan(importance_L).any():
        raise ValueError(f"The importance of layer {int(np.isnan(importance_L).argmax())} is NaN; it must be a number.")
    with np.errstate(divide="ignore"):
        weight_L = 1 / np.maximum(importance_L, 0)
    share_L = np.zeros(len(sizes))
    tiers = [
        (np.isinf(weight_L), caps_L),
        ((weight_L > 0) & np.isfinite(weight_L), weight_L),
        (weight_L == 0, caps_L),
    ]
    left = float(total)
    for member_L, by_L in tiers:
        given = min(left, caps_L[member_L].sum())
        share_L[member_L] = _fill(by_L[member_L], np.zeros(member_L.sum()), caps_L[member_L], given)
        left -= given
    return _round_counts(share_L, caps_L, total, step)


def optimal_counts(
    menus: Sequence[Mapping[int, float]], total: int, *, sensitivity: Sequence[float] | None = None
) -> list[int]:
    """Minimise `sum_i sensitivity[i] * menus[i][n_i]**2` over counts with `sum_i n_i == total`, exactly.

    `menus[i]` maps each offered number of dropped experts to the layer's (unsquared) loss. Solved by dynamic
    programming over the running total: counts are small integers, so it is exact and takes about two seconds for 100
    layers of 512 options, where a MILP has tolerances. Raises ValueError where no choice gives `total`.
    """
    weights = [1.0] * len(menus) if sensitivity is None else sensitivity
    least_N = np.full(total + 1, np.inf)  # least loss of the layers so far by number of experts dropped
    least_N[0] = 0.0
    taken: list[Ints] = []
    for menu, weight in zip(menus, weights, strict=True):
        next_N = np.full(total + 1, np.inf)
        taken_N = np.zeros(total + 1, dtype=np.int64)
        for n in sorted((n for n in menu if n <= total), reverse=True):
            loss_N = least_N[: total + 1 - n] + weight * menu[n] ** 2
            better_N = loss_N < next_N[n:]
            next_N[n:][better_N] = loss_N[better_N]
            taken_N[n:][better_N] = n
        least_N = next_N
        taken.append(taken_N)
    if not np.isfinite(least_N[total]):
        raise ValueError(f"No choice of the offered counts drops exactly {total} experts over {len(menus)} layers.")
    counts, left = [], total
    for taken_N in reversed(taken):
        counts.append(int(taken_N[left]))
        left -= counts[-1]
    return counts[::-1]


def optimal_choice(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The index of one option per group that minimises the summed loss within `budget`: multiple-choice knapsack.

    For options whose costs (bytes) share no small unit; solved as an integer program. Raises ValueError where even the
    cheapest options exceed the budget.
    """
    cheapest = [min(cost) for cost in costs]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ValueError(f"The cheapest options cost {sum(cheapest)} together, more than the budget of {budget}.")
    extra = np.array([c - low for cost, low in zip(costs, cheapest, strict=True) for c in cost], dtype=np.int64)
    loss = np.concatenate([np.asarray(values, dtype=np.float64) - min(values) for values in losses])
    group = np.repeat(np.arange(len(costs)), [len(cost) for cost in costs])
    unit = int(np.gcd.reduce(extra)) or 1
    one_each = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    # HiGHS stops within absolute tolerances of about 1e-6: whole units of cost and losses of about 1e4 put them far
    # below any difference that matters.
    result = milp(
        loss * (1e4 / (loss.max() or 1.0)),
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((extra // unit)[None].astype(np.float64), -np.inf, spare // unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, result.message
    chosen = np.flatnonzero(result.x > 0.5)
    assert extra[chosen].sum() <= spare
    starts = np.searchsorted(group, np.arange(len(costs)))
    return [int(i) for i in chosen - starts]


def importance_ranks(
    importance_E: Sequence[float] | Floats,
    average: float,
    *,
    alpha: float = 0.15,
    multiple: int = 8,
    cap: int,
    eps: float = 1e-8,
) -> list[int]:
    """Ranks proportional to `(importance + eps)**alpha`, in multiples of `multiple`, from one multiple up to `cap`.

    They sum to `average * E` rounded down to a multiple (or to all at `cap`): MoE-I2's formula floors every rank, and
    the whole multiples lost by that go to the largest remainders, the first of equals.
    """
    weight_E = np.power(np.asarray(importance_E, dtype=np.float64) + eps, alpha)
    if not np.isfinite(weight_E).all():
        worst = int(np.argmin(np.isfinite(weight_E)))
        raise ValueError(f"The importance of expert {worst} is {importance_E[worst]}; it must be finite and not negative.")
    units, high = _rank_units(len(weight_E), average, multiple, cap)
    low_E, high_E = np.ones(len(weight_E)), np.full(len(weight_E), float(high))
    share_E = _fill(weight_E, low_E, high_E, units)
    return [multiple * int(r) for r in _largest_remainder(share_E, units, np.ones(len(weight_E)), np.arange(len(weight_E)))]


def uniform_ranks(num_experts: int, average: float, *, multiple: int = 8, cap: int) -> list[int]:
    """Equal ranks with the sum of `importance_ranks`; the multiples left over go to the first experts."""
    units, _ = _rank_units(num_experts, average, multiple, cap)
    each, over = divmod(units, num_experts)
    return [multiple * (each + (e < over)) for e in range(num_experts)]


def optimal_ranks(tails: Sequence[Floats], units: int) -> list[int]:
    """Minimise `sum_j tails[j][u_j]` over whole `u_j >= 1` with `sum_j u_j == units`.

    `tails[j][u]` is the loss of matrix j at `u` units of rank, u = 0 .. len - 1. For convex tails (singular values
    are sorted, so theirs are) the largest gains anywhere are a prefix of every matrix's gains: one sort is the greedy
    heap, and exact. Any other tail is taken as its lower convex hull, which is optimal only where no hull edge is split.
    """
    most = sum(len(tail) - 1 for tail in tails)
    if not len(tails) <= units <= most:
        raise ValueError(f"{len(tails)} matrices take {len(tails)} to {most} units of rank, not {units}.")
    gains = [_hull_gains(np.asarray(tail, dtype=np.float64)[1:]) for tail in tails]
    owner = np.repeat(np.arange(len(tails)), [len(gain) for gain in gains])
    best = np.argsort(-np.concatenate(gains), kind="stable")[: units - len(tails)]
    return (1 + np.bincount(owner[best], minlength=len(tails))).tolist()


def _hull_gains(tail: Floats) -> Floats:
    """What each further unit gains on the lower convex hull: pooling adjacent violators of the gains' order is it."""
    gain = tail[:-1] - tail[1:]
    if (gain[1:] <= gain[:-1]).all():
        return gain
    return isotonic_regression(gain, increasing=False).x


