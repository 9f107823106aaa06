"""Which experts of one layer to drop, given the exact loss of any candidate set.

`genetic` is MoE-I2's search (https://arxiv.org/abs/2411.01016), `exhaustive` is NAEE's (https://arxiv.org/abs/2402.14800).

Shapes: P candidates, E experts in G router groups of M consecutive experts each (E = G M).
`drop_PE` is bool, True where the candidate drops the expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import torch

Loss = Callable[[torch.Tensor], torch.Tensor]
Drop = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best distinct sets, best first, each sorted; fewer than asked for where fewer were evaluated.

    `evaluations` counts the distinct candidates whose loss was computed, `history` is the best loss after each step.
    """

    drops: tuple[Drop, ...]
    losses: tuple[float, ...]
    evaluations: int
    history: tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """All sets of `num_drop` experts that may leave: equally many from each router group, no protected one."""

    num_experts: int
    num_drop: int
    groups: int = 1
    protected: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise ValueError where no valid set exists."""
        if self.num_experts % self.groups:
            raise ValueError(f"{self.num_experts} experts cannot form {self.groups} equal router groups.")
        if self.num_drop < 0 or self.num_drop % self.groups:
            raise ValueError(
                f"Cannot drop {self.num_drop} experts: the router has {self.groups} groups that lose equally many, "
                f"so the number must be a multiple of {self.groups}."
            )
        if not all(0 <= e < self.num_experts for e in self.protected):
            raise ValueError(f"Protected experts {self.protected} must lie in 0..{self.num_experts - 1}.")
        for group, pool in enumerate(self.pools()):
            if len(pool) < self.per_group:
                raise ValueError(
                    f"Cannot drop {self.per_group} experts of router group {group}: only {len(pool)} of its "
                    f"{self.num_experts // self.groups} experts are not protected."
                )

    def size(self) -> int:
        """The exact number of valid sets."""
        return math.prod(math.comb(len(pool), self.per_group) for pool in self.pools())

    @property
    def per_group(self) -> int:
        return self.num_drop // self.groups

    def pools(self) -> list[list[int]]:
        """The experts of each group that may leave."""
        size = self.num_experts // self.groups
        return [
            [e for e in range(group * size, (group + 1) * size) if e not in self.protected]
            for group in range(self.groups)
        ]


def exhaustive(loss: Loss, space: Space, *, keep: int = 1, batch: int = 4096) -> Found:
    """Evaluate every valid set, `batch` at a time; the optimum, for spaces small enough to walk."""
    space.check()
    sets = _every_set(space.pools(), space.per_group)
    best: list[tuple[float, Drop]] = []
    history: list[float] = []
    while drops := list(islice(sets, batch)):
        loss_P = _losses(loss, _masks(drops, space.num_experts))
        leaders = loss_P.argsort(stable=True)[:keep].tolist()
        best = sorted(best + [(float(loss_P[p]), drops[p]) for p in leaders])[:keep]
        history.append(best[0][0])
    return _found(best, space.size(), history)


def random(loss: Loss, space: Space, *, draws: int, seed: int, keep: int = 1) -> Found:
    """The best of `draws` uniform draws; a set drawn again costs nothing."""
    space.check()
    generator = torch.Generator().manual_seed(seed)
    book = _Book(loss, limit=draws)
    history = []
    for first in range(0, draws, 4096):
        book.add(_random_sets(space, min(4096, draws - first), generator))
        history.append(book.best())
    return book.found(keep, history)


def greedy(loss: Loss, space: Space, *, keep: int = 1) -> Found:
    """Backward elimination: drop the expert whose absence hurts least, again and again.

    `history` holds the loss after every single drop. The further sets for `keep` > 1 are the other candidates of the
    last drop, then single swaps of the winner where those are too few.
    """
    space.check()
    if space.num_drop == 0:
        return _found([(0.0, ())], 0, [])
    history, evaluations = [], 0
    for drop_PE, loss_P in _eliminate(loss, space):
        history.append(float(loss_P[0]))
        evaluations += len(loss_P)
    scored = list(zip(loss_P.tolist(), _sets(drop_PE), strict=True))
    if len(scored) < keep:
        book = _Book(loss, limit=space.size())
        book.seen.update(drop for _, drop in scored)
        book.add(_swap_neighbours(drop_PE[0], space))
        scored += book.scored(keep)
        evaluations += len(book.loss_P)
    return _found(sorted(scored)[:keep], evaluations, history)


def greedy_path(
    loss: Loss, num_experts: int, max_drop: int, groups: int = 1, protected: tuple[int, ...] = ()
) -> dict[int, tuple[Drop, float]]:
    """Greedy's nested set and its loss for every n = 0, groups, 2 groups, .. max_drop, from one elimination."""
    space = Space(num_experts, max_drop, groups, protected)
    space.check()
    path: dict[int, tuple[Drop, float]] = {0: ((), 0.0)}
    for count, (drop_PE, loss_P) in enumerate(_eliminate(loss, space), start=1):
        if count % groups == 0:
            path[count] = (_sets(drop_PE[:1])[0], float(loss_P[0]))
    return path


def genetic(
    loss: Loss,
    space: Space,
    *,
    population: int = 100,
    generations: int = 50,
    seed: int = 0,
    keep: int = 1,
    max_evaluations: int = 5000,
    mutation: float = 0.3,
    start: Sequence[Drop] = (),
    reserve: float = 0.5, climb_all=False, tour=2,
) -> Found:
    space.check()
    generator = torch.Generator().manual_seed(seed)
    book = _Book(loss, limit=min(max_evaluations, space.size()))
    book.add(torch.cat([_masks(start, space.num_experts), _random_sets(space, population, generator)]))
    history = [book.best()]
    for _ in range(generations):
        if book.left <= reserve * book.limit:
            break
        parent_PE, loss_P = book.top(population)
        child_PE = _cross(parent_PE, population, space, generator, tour)
        child_PE = _mutate(child_PE, mutation, space, generator)
        book.add(child_PE)
        history.append(book.best())
    # best-first
    explored = set()
    while book.left:
        top_PE, loss_P = book.top(len(book.seen) if climb_all else keep)
        todo = [p for p, d in enumerate(_sets(top_PE)) if d not in explored]
        if not todo: break
        p = todo[0]
        near_PE = _swap_neighbours(top_PE[p], space)
        near_PE = near_PE[torch.randperm(len(near_PE), generator=generator)]
        for chunk in near_PE.split(population):
            new = book.add(chunk)
            if len(new) and new.min() < loss_P[p]:
                break
        else:
            explored.add(_sets(top_PE[p:p+1])[0])
        history.append(book.best())
    return book.found(keep, history)


class _Book:
    """Every set evaluated so far: none is evaluated twice, and no more than `limit` are."""

    def __init__(self, loss: Loss, *, limit: int) -> None:
        self.loss, self.limit = loss, limit
        self.seen: set[Drop] = set()
        self.drop_PE = torch.empty(0, 0, dtype=torch.bool)
        self.loss_P = torch.empty(0, dtype=torch.float64)

    @property
    def left(self) -> int:
        return self.limit - len(self.loss_P)

    def add(self, drop_PE: torch.Tensor) -> torch.Tensor:
        fresh = []
        for p, drop in enumerate(_sets(drop_PE)):
            if drop not in self.seen and len(fresh) < self.left:
                self.seen.add(drop)
                fresh.append(p)
        if not fresh:
            return self.loss_P[:0]
        drop_PE = drop_PE[fresh]
        loss_P = _losses(self.loss, drop_PE)
        self.drop_PE = torch.cat([self.drop_PE, drop_PE]) if self.drop_PE.numel() else drop_PE
        self.loss_P = torch.cat([self.loss_P, loss_P])
        return loss_P

    def best(self) -> float:
        return float(self.loss_P.min())

    def top(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = self.loss_P.argsort(stable=True)[:count]
        return self.drop_PE[order], self.loss_P[order]

    def scored(self, keep: int) -> list[tuple[float, Drop]]:
        drop_PE, loss_P = self.top(keep)
        return sorted(zip(loss_P.tolist(), _sets(drop_PE), strict=True))

    def found(self, keep: int, history: list[float]) -> Found:
        return _found(self.scored(keep), len(self.loss_P), history)


def _found(scored: list[tuple[float, Drop]], evaluations: int, history: list[float]) -> Found:
    losses, drops = zip(*scored, strict=True)
    return Found(drops=drops, losses=losses, evaluations=evaluations, history=tuple(history))


def _losses(loss: Loss, drop_PE: torch.Tensor) -> torch.Tensor:
    loss_P = loss(drop_PE)
    if loss_P.isnan().any():
        raise ValueError("nan")
    return loss_P


def _sets(drop_PE: torch.Tensor) -> list[Drop]:
    count = int(drop_PE[0].sum()) if len(drop_PE) else 0
    return [tuple(row) for row in drop_PE.nonzero()[:, 1].view(len(drop_PE), count).tolist()]


def _masks(drops: Sequence[Drop], num_experts: int) -> torch.Tensor:
    drop_PE = torch.zeros(len(drops), num_experts, dtype=torch.bool)
    if drops:
        drop_PE.scatter_(1, torch.tensor(drops, dtype=torch.long), True)
    return drop_PE


def _every_set(pools: list[list[int]], per_group: int) -> Iterator[Drop]:
    if not pools:
        yield ()
        return
    for head in combinations(pools[0], per_group):
        for tail in _every_set(pools[1:], per_group):
            yield head + tail


def _eliminate(loss: Loss, space: Space) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """After every drop: the candidates of that drop and their losses, best first."""
    drop_E = torch.zeros(space.num_experts, dtype=torch.bool)
    for _ in range(space.per_group):
        waiting = space.pools()  # the groups that have not lost an expert in this round
        while waiting:
            experts = [e for pool in waiting for e in pool if not drop_E[e]]
            drop_PE = drop_E.repeat(len(experts), 1)
            drop_PE[torch.arange(len(experts)), experts] = True
            loss_P = _losses(loss, drop_PE)
            order = loss_P.argsort(stable=True)
            yield drop_PE[order], loss_P[order]
            drop_E = drop_PE[order[0]]
            waiting = [pool for pool in waiting if experts[order[0]] not in pool]


def _random_sets(space: Space, count: int, generator: torch.Generator) -> torch.Tensor:
    return _choose(torch.rand(count, space.num_experts, generator=generator), space)


def _choose(priority_PE: torch.Tensor, space: Space) -> torch.Tensor:
    """The set of highest priority: the first of each group, no protected one."""
    P, E = priority_PE.shape
    priority_PE = priority_PE.index_fill(1, torch.tensor(space.protected, dtype=torch.long), -1.0)
    index_PGn = priority_PE.view(P, space.groups, -1).topk(space.per_group, dim=2).indices
    drop_PGM = torch.zeros(P, space.groups, E // space.groups, dtype=torch.bool).scatter_(2, index_PGn, True)
    return drop_PGM.view(P, E)


def _cross(parent_PE, count, space, generator, tour=2):
    # parents sorted best first: the lower of `tour` draws wins
    pair = torch.randint(len(parent_PE), (2, count, tour), generator=generator).amin(2)
    a_PE, b_PE = parent_PE[pair[0]], parent_PE[pair[1]]
    noise_PE = torch.rand(count, space.num_experts, generator=generator)
    return _choose(noise_PE + a_PE + b_PE, space)


def _mutate(drop_PE, probability, space, generator):
    P, E = drop_PE.shape
    swaps_P = torch.randint(1, 4, (P,), generator=generator) * (torch.rand(P, generator=generator) < probability)
    free_E = torch.zeros(E, dtype=torch.bool)
    free_E[[e for pool in space.pools() if len(pool) > space.per_group for e in pool]] = True
    group_E = torch.arange(E) // (E // space.groups)
    if not free_E.any(): return drop_PE
    for swap in range(3):
        row = (swaps_P > swap).nonzero()[:, 0]
        if not len(row): break
        d = drop_PE[row]
        out = (torch.rand(d.shape, generator=generator) * (d & free_E)).argmax(1)
        outsider = free_E & ~d & (group_E == group_E[out][:, None])
        inn = (torch.rand(d.shape, generator=generator) * outsider).argmax(1)
        drop_PE = drop_PE.clone()
        drop_PE[row, out] = False
        drop_PE[row, inn] = True
    return drop_PE


def _swap_neighbours(drop_E, space):
    rows = []
    for pool in space.pools():
        for a in pool:
            if drop_E[a]:
                for b in pool:
                    if not drop_E[b]:
                        r = drop_E.clone(); r[a] = False; r[b] = True; rows.append(r)
    return torch.stack(rows) if rows else drop_E[None][:0]
