"""Budgets against slow, obvious references: all vectors, all choices, exact fractions, one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimoe.methods.budget import (
    importance_counts,
    importance_ranks,
    optimal_counts,
    uniform_counts,
    uniform_ranks,
)


def water_fill(weights: Sequence[Fraction], caps: Sequence[int], total: Fraction) -> list[Fraction]:
    """Proportional shares; whoever is over the cap is set to it and the rest shared out again."""
    share, free = [Fraction(0)] * len(caps), set(range(len(caps)))
    while free:
        left = total - sum(share[i] for i in range(len(caps)) if i not in free)
        for i in free:
            share[i] = left * weights[i] / sum(weights[j] for j in free)
        over = {i for i in free if share[i] > caps[i]}
        if not over:
            break
        for i in over:
            share[i] = Fraction(caps[i])
        free -= over
    return share


def vectors(caps: Sequence[int], step: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    ranges = [range(0, cap + 1, by) for cap, by in zip(caps, step, strict=True)]
    return (counts for counts in product(*ranges) if sum(counts) == total)


def nearest(share: Sequence[Fraction], caps: Sequence[int], step: Sequence[int], total: int) -> tuple[int, ...]:
    """The valid counts nearest to the shares; of equally near ones those that drop more in later layers."""

    def far(counts: tuple[int, ...]) -> Fraction:
        return sum(((n - s) ** 2 for n, s in zip(counts, share, strict=True)), Fraction(0))

    return min(vectors(caps, step, total), key=lambda counts: (far(counts), [-n for n in counts[::-1]]))


layers = st.lists(
    st.tuples(st.integers(2, 12), st.integers(0, 12), st.sampled_from([1, 2, 3])).filter(lambda t: t[1] <= t[0]),
    min_size=1,
    max_size=4,
)


@given(layers, st.integers(0, 30), st.booleans(), st.lists(st.integers(1, 5), min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_counts_are_the_nearest_valid_ones(rows: list[tuple[int, int, int]], total: int, same_step: bool, importance: list[int]) -> None:
    sizes, floors, step = (list(column) for column in zip(*rows, strict=True))
    step = [step[0]] * len(step) if same_step else step
    importance = importance[: len(sizes)]
    caps = [(size - floor) // by * by for size, floor, by in zip(sizes, floors, step, strict=True)]
    if not any(True for _ in vectors(caps, step, total)):
        with pytest.raises(ValueError, match=rf"Cannot drop (exactly )?{total} "):
            uniform_counts(sizes, total, floors=floors, step=step)
        with pytest.raises(ValueError, match=rf"Cannot drop (exactly )?{total} "):
            importance_counts(importance, sizes, total, floors=floors, step=step)
        return
    by_size = water_fill([Fraction(size) for size in sizes], caps, Fraction(total))
    by_importance = water_fill([Fraction(1, value) for value in importance], caps, Fraction(total))
    uniform = uniform_counts(sizes, total, floors=floors, step=step)
    weighed = importance_counts(importance, sizes, total, floors=floors, step=step)
    for counts, share in ((uniform, by_size), (weighed, by_importance)):
        best = nearest(share, caps, step, total)
        if len(set(step)) == 1:
            assert tuple(counts) == best
        else:  # largest remainder may reach the total without being nearest: valid is what is promised
            assert tuple(counts) in set(vectors(caps, step, total))


def test_counts_in_everyday_cases() -> None:
    def even(layers: int, total: int, floor: int = 2, step: int = 1) -> list[int]:
        return uniform_counts([8] * layers, total, floors=[floor] * layers, step=[step] * layers)

    assert even(4, 9) == [2, 2, 2, 3]
    assert even(4, 10, step=2) == [2, 2, 2, 4]
    assert uniform_counts([8, 16, 64], 22, floors=[1, 1, 1], step=[1, 1, 1]) == [2, 4, 16]
    assert uniform_counts([3, 9, 18], 16, floors=[1] * 3, step=[1] * 3) == [1, 5, 10]  # 1.6, 4.8, 9.6: a tie
    assert uniform_counts([8, 8], 6, floors=[7, 2], step=[1, 1]) == [1, 5]
    assert uniform_counts([8, 8, 8], 7, floors=[2] * 3, step=[3, 3, 1]) == [3, 3, 1]
    assert uniform_counts([60, 30], 23, floors=[1, 1], step=[4, 3]) == [20, 3]  # only [8, 15] else; the shares are 15.3 and 7.7
    assert importance_counts([1.0, 2.0, 4.0], [16] * 3, 14, floors=[2] * 3, step=[1] * 3) == [8, 4, 2]
    assert importance_counts([1.0, 2.0, 4.0], [8] * 3, 12, floors=[2] * 3, step=[1] * 3) == [6, 4, 2]


def test_counts_of_layers_that_do_not_matter_or_matter_most() -> None:
    def share(importance: list[float], total: int) -> list[int]:
        return importance_counts(importance, [8] * 4, total, floors=[2] * 4, step=[1] * 4)

    assert share([0.0, 1.0, 1.0, 1.0], 5) == [5, 0, 0, 0]
    assert share([0.0, 1.0, 1.0, 1.0], 9) == [6, 1, 1, 1]
    assert share([-3.0, 0.0, 1.0, 1.0], 8) == [4, 4, 0, 0]
    assert share([1e-320, 0.0, 1.0, 1.0], 8) == [4, 4, 0, 0]
    assert share([math.inf, 1.0, 1.0, 2.0], 10) == [0, 4, 4, 2]
    assert importance_counts([math.inf, math.inf, 1.0], [8, 32, 8], 18, floors=[2] * 3, step=[1] * 3) == [2, 10, 6]
    assert importance_counts([0.0, 0.0, 1.0, math.inf], [8] * 4, 7, floors=[8, 6, 3, 8], step=[1] * 4) == [0, 2, 5, 0]
    with pytest.raises(ValueError, match="layer 2 is not a number"):
        share([1.0, 2.0, math.nan, 1.0], 4)


def test_counts_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="Layer 1 has 8 experts and cannot keep 9"):
        uniform_counts([8, 8], 2, floors=[2, 9], step=[1, 1])
    with pytest.raises(ValueError, match="Cannot drop 10 of 16 experts: from 0 to 8 can go"):
        uniform_counts([8, 8], 10, floors=[3, 3], step=[2, 2])
    with pytest.raises(ValueError, match="Cannot drop -1 of 16"):
        uniform_counts([8, 8], -1, floors=[2, 2], step=[1, 1])
    with pytest.raises(ValueError, match=r"exactly 6 experts where layers drop multiples of \[4\]"):
        uniform_counts([16, 16], 6, floors=[2, 2], step=[4, 4])


menus = st.lists(
    st.dictionaries(st.integers(0, 8), st.floats(0, 10, allow_nan=False), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


@given(menus, st.integers(0, 24), st.lists(st.floats(0, 4), min_size=5, max_size=5), st.booleans())
@settings(max_examples=100, deadline=None)
def test_optimal_counts_are_brute_force(offers: list[dict[int, float]], total: int, weights: list[float], weighted: bool) -> None:
    sensitivity = weights[: len(offers)] if weighted else None

    def cost(counts: Sequence[int]) -> float:
        values = [menu[n] ** 2 for menu, n in zip(offers, counts, strict=True)]
        return sum(w * v for w, v in zip(sensitivity or [1.0] * len(values), values, strict=True))

    feasible = [counts for counts in product(*offers) if sum(counts) == total]
    if not feasible:
        with pytest.raises(ValueError, match=f"drops {total} experts"):
            optimal_counts(offers, total, sensitivity=sensitivity)
        return
    counts = optimal_counts(offers, total, sensitivity=sensitivity)
    assert tuple(counts) in feasible
    assert cost(counts) == pytest.approx(min(map(cost, feasible)), rel=1e-12, abs=1e-300)


def test_importance_ranks_are_the_papers_formula_where_nothing_binds() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        importance, average = rng.random(16) * 100, 64 + 32 * rng.random()
        weight = (importance + 1e-8) ** 0.15
        share = weight / weight.sum() * average * 16 / 8
        ranks = importance_ranks(importance, average, cap=10_000)
        assert sum(ranks) == math.floor(average * 16 / 8) * 8
        up = [rank // 8 - math.floor(s) for rank, s in zip(ranks, share, strict=True)]
        assert set(up) <= {0, 1}
        remainder = share - np.floor(share)
        assert min(remainder[np.array(up) == 1], default=1) >= max(remainder[np.array(up) == 0], default=0)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    st.floats(8, 200),
    st.sampled_from([0.0, 0.15, 1.0, 3.0]),
    st.integers(1, 20),
)
@settings(max_examples=100, deadline=None)
def test_importance_ranks_obey_their_bounds(importance: list[float], average: float, alpha: float, most: int) -> None:
    num, cap = len(importance), 8 * most
    ranks = importance_ranks(importance, average, alpha=alpha, cap=cap)
    units = math.floor(Fraction(average) * num / 8 + Fraction(1, 10**9))
    assert sum(ranks) == 8 * min(units, most * num) == sum(uniform_ranks(num, average, cap=cap))
    assert all(rank % 8 == 0 and 8 <= rank <= cap for rank in ranks)
    for a, b in product(range(num), repeat=2):
        if importance[a] > importance[b]:
            assert ranks[a] >= ranks[b] - 8 * (alpha == 0 or importance[a] - importance[b] < 1e-3)
    # Between the bounds one scale explains all ranks, to within the unit that rounding moves.
    weight = (np.array(importance) + 1e-8) ** alpha
    low = max((r / 8 - 1) / w for r, w in zip(ranks, weight, strict=True) if r > 8) if max(ranks) > 8 else 0.0
    high = min((r / 8 + 1) / w for r, w in zip(ranks, weight, strict=True) if r < cap) if min(ranks) < cap else math.inf
    assert low <= high * (1 + 1e-9)


def test_ranks_in_everyday_cases() -> None:
    assert uniform_ranks(4, 20.0, cap=64) == [24, 24, 16, 16]
    assert uniform_ranks(4, 100.0, cap=64) == [64] * 4
    assert uniform_ranks(3, 5.0, multiple=1, cap=9) == [5, 5, 5]
    assert importance_ranks([1.0] * 4, 20.0, cap=64) == [24, 24, 16, 16]
    assert importance_ranks([0.0, 0.0, 1.0, 1e9], 24.0, alpha=1.0, cap=40) == [8, 8, 40, 40]
    assert importance_ranks([1.0, 3.0], 16.0, alpha=1.0, cap=64) == [8, 24]
    assert all(type(rank) is int for rank in importance_ranks(np.ones(4), 16.0, cap=64))


def tail_of(gains: Sequence[float] | np.ndarray) -> np.ndarray:
    """The convex loss of a matrix whose units of rank gain so much, the largest first."""
    return np.append(np.cumsum(sorted(gains))[::-1], 0.0)


convex_tails = st.lists(st.floats(0, 100), min_size=1, max_size=6).map(tail_of)
