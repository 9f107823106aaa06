"""Searches against slow, obvious references: brute force over itertools.combinations."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimoe.methods.expert_drop import search
from trimoe.methods.expert_drop.search import Drop, Found, Space, exhaustive, genetic, greedy, greedy_path, random

SMALL = [Space(8, 2), Space(8, 4), Space(16, 4), Space(16, 8), Space(64, 2), Space(24, 8, groups=4, protected=(0, 13))]
IDS = [f"E{s.num_experts}n{s.num_drop}g{s.groups}" for s in SMALL]


class Rugged:
    """Distance of a renormalised weighted mean of correlated vectors to the full mean: what dropping experts costs.

    Remembers every candidate it was asked for, and the most at once.
    """

    def __init__(self, num_experts: int, seed: int) -> None:
        rand = torch.Generator().manual_seed(seed)
        shared = 0.6 * torch.randn(1, max(4, num_experts // 2), generator=rand, dtype=torch.float64)
        vectors = torch.randn(num_experts, shared.shape[1], generator=rand, dtype=torch.float64) + shared
        self.vectors = vectors * (2 * torch.rand(num_experts, 1, generator=rand, dtype=torch.float64)).exp()
        self.weights = torch.rand(num_experts, generator=rand, dtype=torch.float64) + 1e-3
        self.asked: list[Drop] = []
        self.most = 0

    def __call__(self, drop_PE: torch.Tensor) -> torch.Tensor:
        assert drop_PE.dtype == torch.bool and len(drop_PE)
        self.asked += [tuple(row.nonzero()[:, 0].tolist()) for row in drop_PE]
        self.most = max(self.most, len(drop_PE))
        return self.of(drop_PE)

    def of(self, drop_PE: torch.Tensor) -> torch.Tensor:
        left_PE = (~drop_PE) * self.weights
        mean_PH = left_PE @ self.vectors / left_PE.sum(1, keepdim=True)
        loss_P: torch.Tensor = torch.linalg.vector_norm(mean_PH - self.weights @ self.vectors / self.weights.sum(), dim=1)
        return loss_P

    def one(self, drop: Drop) -> float:
        mask = torch.zeros(1, len(self.weights), dtype=torch.bool)
        mask[0, list(drop)] = True
        return float(self.of(mask))


def valid(drop: Drop, space: Space) -> bool:
    size = space.num_experts // space.groups
    each = [sum(group * size <= e < (group + 1) * size for e in drop) for group in range(space.groups)]
    return set(each) == {space.num_drop // space.groups} and list(drop) == sorted(set(drop)) and not set(drop) & set(space.protected)


def every(space: Space) -> list[Drop]:
    return [drop for drop in combinations(range(space.num_experts), space.num_drop) if valid(drop, space)]


def assert_sound(found: Found, loss: Rugged, space: Space, keep: int) -> None:
    assert len(set(found.drops)) == len(found.drops) == len(found.losses) <= keep
    assert all(valid(drop, space) for drop in found.drops)
    assert list(found.losses) == sorted(found.losses)
    assert found.losses == pytest.approx([loss.one(drop) for drop in found.drops])
    assert found.evaluations == len(loss.asked) == len(set(loss.asked)), "a set was evaluated twice, or not counted"


spaces = st.builds(
    lambda groups, size, each, protected: Space(
        groups * size, groups * min(each, size), groups, tuple(e for e in protected if e < groups * size)
    ),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 4),
    st.sets(st.integers(0, 11), max_size=3),
)


@given(spaces)
@settings(max_examples=40, deadline=None)
def test_space_counts_its_sets_and_refuses_exactly_the_empty_ones(space: Space) -> None:
    sets = every(space)
    assert space.size() == len(sets)
    if sets:
        space.check()
    else:
        with pytest.raises(ValueError, match="Router group"):
            space.check()


def test_space_refuses_what_no_router_can_do() -> None:
    with pytest.raises(ValueError, match="equally from 4 router groups"):
        Space(16, 6, groups=4).check()
    with pytest.raises(ValueError, match="10 experts cannot form 4"):
        Space(10, 4, groups=4).check()
    with pytest.raises(ValueError, match=r"Router group 1 has 1 experts to drop, not 2\."):
        Space(8, 4, groups=2, protected=(4, 5, 6)).check()
    with pytest.raises(ValueError, match="Cannot drop -1"):
        Space(8, -1).check()
    assert Space(512, 256).size() == math.comb(512, 256)


@given(spaces, st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_exhaustive_is_brute_force(space: Space, batch: int, keep: int, seed: int) -> None:
    sets = every(space)
    if not sets or space.num_drop == space.num_experts:
        return
    loss = Rugged(space.num_experts, seed)
    found = exhaustive(loss, space, keep=keep, batch=batch)
    assert_sound(found, loss, space, keep)
    assert found.history[-1] == found.losses[0]
    assert loss.most <= batch
    assert sorted(loss.asked) == sets
    assert found.losses == pytest.approx(sorted(loss.one(drop) for drop in sets)[:keep])


def test_exhaustive_does_not_list_the_space() -> None:
    def stop(drop_PE: torch.Tensor) -> torch.Tensor:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        exhaustive(stop, Space(256, 128))


def eliminated(loss: Rugged, space: Space) -> list[tuple[Drop, float]]:
    """Greedy, the slow and obvious way: the state after every single drop."""
    size, gone, states = space.num_experts // space.groups, set[int](), []
    while len(gone) < space.num_drop:
        lost = [sum(e // size == group for e in gone) for group in range(space.groups)]
        behind = [group for group in range(space.groups) if lost[group] == min(lost)]
        free = [e for e in range(space.num_experts) if e // size in behind and e not in gone | set(space.protected)]
        gone.add(min(free, key=lambda e: loss.one(tuple(gone | {e}))))
        states.append((tuple(sorted(gone)), loss.one(tuple(gone))))
    return states


@pytest.mark.parametrize("space", [Space(12, 5), Space(12, 5, protected=(0, 7)), SMALL[-1], Space(12, 12 - 3, groups=3)])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_backward_elimination(space: Space, seed: int) -> None:
    loss = Rugged(space.num_experts, seed)
    states = eliminated(loss, space)
    found = greedy(loss, space)
    assert_sound(found, loss, space, keep=1)
    assert found.drops == (states[-1][0],)
    assert found.history == pytest.approx([value for _, value in states])

    path = greedy_path(loss, space.num_experts, space.num_drop, space.groups, space.protected)
    assert list(path) == list(range(0, space.num_drop + 1, space.groups))
    assert path[0] == ((), 0.0)
    for n in list(path)[1:]:
        assert path[n][0] == states[n - 1][0]
        assert path[n][1] == pytest.approx(states[n - 1][1])


@pytest.mark.parametrize("space", [Space(12, 5), Space(6, 5), Space(6, 5, protected=(2,)), SMALL[-1], Space(8, 0)])
def test_greedy_keeps_distinct_sets(space: Space) -> None:
    loss = Rugged(space.num_experts, 5)
    found = greedy(loss, space, keep=4)
    assert len(found.drops) == min(4, space.size())
    if space.num_drop:
        assert_sound(found, loss, space, keep=4)
        assert found.losses[0] <= eliminated(loss, space)[-1][1] + 1e-12
    else:
        assert (found.drops, found.losses, found.evaluations) == (((),), (0.0,), 0)


@pytest.mark.parametrize("space", SMALL, ids=IDS)
def test_random_draws_valid_distinct_sets(space: Space) -> None:
    loss = Rugged(space.num_experts, 0)
    found = random(loss, space, draws=200, seed=1, keep=3)
    assert_sound(found, loss, space, keep=3)
    assert found.evaluations <= 200
    assert all(valid(drop, space) for drop in loss.asked)
    assert found == random(loss, space, draws=200, seed=1, keep=3)
    assert found.drops[0] == min(loss.asked, key=loss.one)
    if space.size() > 10_000:
        assert random(loss, space, draws=200, seed=2, keep=3).drops != found.drops


def test_random_is_uniform() -> None:
    loss = Rugged(6, 0)
    for seed in range(600):
        random(loss, Space(6, 2, protected=(5,)), draws=1, seed=seed)
    assert {drop: loss.asked.count(drop) for drop in set(loss.asked)}.keys() == set(combinations(range(5), 2))
    assert all(35 <= loss.asked.count(drop) <= 90 for drop in set(loss.asked))  # 60 each, about four sigma


@pytest.mark.parametrize("space", SMALL[:-1], ids=IDS[:-1])
@pytest.mark.parametrize("problem", range(4))
def test_genetic_finds_the_optimum(space: Space, problem: int) -> None:
    loss = Rugged(space.num_experts, problem)
    optimum = exhaustive(loss.of, space).losses[0]
    found = genetic(loss, space, seed=problem, keep=3)
    assert_sound(found, loss, space, keep=3)
    assert len(found.drops) == 3
    assert found.evaluations <= 5000
    assert found.losses[0] <= 1.005 * optimum
    assert list(found.history) == sorted(found.history, reverse=True)
    assert found.history[-1] == found.losses[0]


def test_genetic_respects_groups_and_protection() -> None:
    for space in (SMALL[-1], Space(12, 6, groups=3, protected=(0, 1, 11)), Space(9, 6, groups=3, protected=(4,))):
        loss = Rugged(space.num_experts, 3)
        found = genetic(loss, space, population=20, max_evaluations=600, keep=2, mutation=1.0)
        assert_sound(found, loss, space, keep=2)
        assert all(valid(drop, space) for drop in loss.asked)
        assert found.evaluations == min(600, space.size())
        if space.size() <= 600:
            assert found.losses == pytest.approx(exhaustive(loss.of, space, keep=2).losses)


@pytest.mark.parametrize("space", [Space(4, 0), Space(5, 3, protected=(1, 4)), Space(8, 4, groups=2, protected=(0, 1, 6, 7))])
def test_genetic_ends_where_there_is_one_set(space: Space) -> None:
    found = genetic(Rugged(space.num_experts, 0), space, keep=3)
    assert (found.evaluations, len(found.drops)) == (1, 1)


def test_genetic_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    loss, state = Rugged(32, 1), torch.get_rng_state()
    first = genetic(loss, Space(32, 8), max_evaluations=800, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert genetic(loss, Space(32, 8), max_evaluations=800, seed=3) == first
    assert genetic(loss, Space(32, 8), max_evaluations=800, seed=4).history != first.history


def test_genetic_starts_from_given_sets() -> None:
    hidden = (3, 5, 8, 13, 21, 34)

    def needle(drop_PE: torch.Tensor) -> torch.Tensor:
        target_E = torch.zeros(64, dtype=torch.bool)
        target_E[list(hidden)] = True
        return 1.0 - (drop_PE == target_E).all(1).double()

    assert genetic(needle, Space(64, 6), max_evaluations=300, start=[hidden]).drops == (hidden,)
    assert genetic(needle, Space(64, 6), max_evaluations=300).losses == (1.0,)
    for wrong in ((1, 2, 3), (1, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 64)):
        with pytest.raises(ValueError, match="start set"):
            genetic(needle, Space(64, 6), start=[wrong])


def test_genetic_beats_random_and_improves_greedy_where_nobody_can_enumerate() -> None:
    loss, space = Rugged(64, 0), Space(64, 16)
    start = greedy(loss.of, space)
    found = genetic(loss.of, space, start=start.drops)
    assert found.evaluations == 5000
    assert found.losses[0] < start.losses[0]
    assert genetic(loss.of, space).losses[0] < 0.8 * random(loss.of, space, draws=5000, seed=0).losses[0]


def test_children_keep_the_intersection_and_stay_in_the_union() -> None:
    space = Space(20, 6)
    parents = torch.zeros(2, 20, dtype=torch.bool)
    parents[0, [0, 1, 2, 3, 4, 5]] = True
    parents[1, [4, 5, 6, 7, 8, 9]] = True
    children = search._cross(parents, 200, space, torch.Generator().manual_seed(0))
    assert (children.sum(1) == 6).all()
    assert children[:, [4, 5]].all()
    assert not children[:, 10:].any()
    assert children[:, :10].any(0).all()
    assert len({tuple(child) for child in children.tolist()}) > 20

    mutants = search._mutate(children.clone(), 1.0, space, torch.Generator().manual_seed(0))
    swapped = (mutants & ~children).sum(1)
    assert (mutants.sum(1) == 6).all()
    assert swapped.max() == 3 and set(swapped.tolist()) <= {0, 1, 2, 3}
    assert torch.equal(search._mutate(children.clone(), 0.0, space, torch.Generator().manual_seed(0)), children)


@pytest.mark.parametrize("run", [exhaustive, greedy, genetic, lambda loss, space: random(loss, space, draws=50, seed=0)])
def test_nan_losses_are_refused(run) -> None:  # type: ignore[no-untyped-def]
    def broken(drop_PE: torch.Tensor) -> torch.Tensor:
        return torch.where(drop_PE[:, 3], torch.nan, 1.0).double()

    with pytest.raises(ValueError, match=r"dropping experts \(.*\b3\b.*\) is NaN"):
        run(broken, Space(6, 2))
