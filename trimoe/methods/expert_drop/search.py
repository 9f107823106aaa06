"""Which experts of one layer to drop, given the exact loss of any candidate set.

`genetic` is MoE-I2's search (https://arxiv.org/abs/2411.01016), `exhaustive` is NAEE's (https://arxiv.org/abs/2402.14800).

Shapes: P candidates, E experts in G router groups of M consecutive experts each (E = G M), n experts of a group leave.
`drop_PE` is bool, True where the candidate drops the expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, nsmallest
from itertools import accumulate, combinations, islice

import torch

Loss = Callable[[torch.Tensor], torch.Tensor]  # drop_PE -> float64 [P], lower is better, both on the CPU
Drop = tuple[int, ...]  # the dropped experts, sorted
Scored = list[tuple[float, Drop]]

BATCH = 4096  # candidates a loss is asked for at once, at most
CLIMB_SHARE = 0.4  # of the evaluations: measured best of 0 to 0.8, crossover alone stops beside the optimum


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best distinct sets, best first; fewer than asked for where fewer were evaluated.

    `evaluations` counts the distinct candidates whose loss was computed, `history` is the best loss after each step, `trace` where the best
    loss fell: after how many evaluations, and to what.
    """

    drops: tuple[Drop, ...]
    losses: tuple[float, ...]
    evaluations: int
    history: tuple[float, ...]
    trace: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Space:
    """All sets of `num_drop` experts that may leave: equally many of each router group, no protected expert."""

    num_experts: int
    num_drop: int
    groups: int = 1
    protected: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise ValueError where no set is valid."""
        if self.num_experts % self.groups:
            raise ValueError(f"{self.num_experts} experts cannot form {self.groups} equal router groups.")
        if self.num_drop < 0 or self.num_drop % self.groups:
            raise ValueError(f"Cannot drop {self.num_drop} experts equally from {self.groups} router groups.")
        for group, pool in enumerate(self.pools()):
            if len(pool) < self.per_group:
                raise ValueError(f"Router group {group} has {len(pool)} experts to drop, not {self.per_group}.")

    def size(self) -> int:
        """The exact number of valid sets."""
        return math.prod(math.comb(len(pool), self.per_group) for pool in self.pools())

    @property
    def per_group(self) -> int:
        return self.num_drop // self.groups

    def pools(self) -> list[list[int]]:
        """The experts of each group that may leave."""
        size, closed = self.num_experts // self.groups, set(self.protected)
        return [[e for e in range(g * size, (g + 1) * size) if e not in closed] for g in range(self.groups)]

    def holds(self, drop: Drop) -> bool:
        return len(drop) == self.num_drop and all(len(set(pool) & set(drop)) == self.per_group for pool in self.pools())


def exhaustive(loss: Loss, space: Space, *, keep: int = 1, batch: int = BATCH) -> Found:
    """Evaluate every valid set, `batch` at a time: the optimum, for spaces small enough to walk."""
    space.check()
    sets = _every_set(space.pools(), space.per_group)
    best: Scored = []
    history: list[float] = []
    trace: list[tuple[int, float]] = []
    while drops := list(islice(sets, batch)):
        losses = _evaluate(loss, _masks(drops, space.num_experts)).tolist()
        best = nsmallest(keep, best + list(zip(losses, drops, strict=True)))
        if not history or best[0][0] < history[-1]:
            trace.append((min((len(history) + 1) * batch, space.size()), best[0][0]))
        history.append(best[0][0])
    return _found(best, space.size(), history, trace)


def random(loss: Loss, space: Space, *, draws: int, seed: int, keep: int = 1) -> Found:
    """The best of `draws` uniform draws; a set drawn again costs nothing."""
    space.check()
    book = _Book(loss, limit=draws)
    book.add(_choose(torch.rand(draws, space.num_experts, generator=torch.Generator().manual_seed(seed)), space))
    return _found(book.best(keep), len(book.losses), book.history, book.falls())


def greedy(loss: Loss, space: Space, *, keep: int = 1) -> Found:
    """Backward elimination: drop the expert whose absence hurts least, again and again.

    `history` holds the loss after every single drop. With groups, each round drops one expert of every group. For
    `keep` > 1 the other candidates of the last drop compete too and, where those are too few, single swaps.
    """
    space.check()
    history: list[float] = []
    evaluations = -1  # the empty set is not evaluated
    for step in _eliminate(loss, space):
        history.append(float(step[1][0]))
        evaluations += len(step[1])
    scored = _scored(*step)
    if len(scored) < min(keep, space.size()):
        book = _Book(loss, limit=space.size())
        book.losses.update((drop, value) for value, drop in scored)
        evaluations += len(book.add(_swaps(scored[0][1], space, torch.Generator())))
        scored = book.best(keep)
    return _found(scored[:keep], evaluations, history[1:], [(evaluations, scored[0][0])])


def greedy_path(
    loss: Loss, num_experts: int, max_drop: int, groups: int = 1, protected: tuple[int, ...] = ()
) -> dict[int, tuple[Drop, float]]:
    """Greedy's nested sets and their losses for n = 0, groups, 2 groups, .. max_drop, from one elimination."""
    space = Space(num_experts, max_drop, groups, protected)
    space.check()
    steps = enumerate(_eliminate(loss, space))
    return {n: (_sets(drop_PE[:1])[0], float(loss_P[0])) for n, (drop_PE, loss_P) in steps if n % groups == 0}


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
) -> Found:
    """MoE-I2's genetic search, then single swaps with what is left of `max_evaluations` (a memetic search).

    The first population is random, after the sets of `start`. The parents are the best `population` sets seen so far;
    a child keeps the intersection of two parents and draws the rest from their union; with probability `mutation` it
    swaps one to three members for outsiders. Plain crossover often stops one swap beside the optimum, so at least
    CLIMB_SHARE of the evaluations go to swapping: the neighbours of the best set, of the next best when it has no
    better neighbour, and so on. Ends when `max_evaluations` distinct sets, or all there are, have been evaluated.
    """
    space.check()
    for drop in start:
        if not space.holds(drop):
            raise ValueError(f"The start set {drop} is not a valid choice for {space}.")
    generator = torch.Generator().manual_seed(seed)
    limit = min(max_evaluations, space.size())
    book = _Book(loss, limit=limit)
    random_PE = _choose(torch.rand(population, space.num_experts, generator=generator), space)
    book.add(torch.cat([_masks(start, space.num_experts), random_PE]))
    for _ in range(generations):
        if book.left <= CLIMB_SHARE * limit:
            break
        parent_PE = _masks([drop for _, drop in book.best(population)], space.num_experts)
        book.add(_mutate(_cross(parent_PE, population, space, generator), mutation, space, generator))
    _climb(book, space, population, generator)
    return _found(book.best(keep), len(book.losses), book.history, book.falls())


class _Book:
    """Every set evaluated so far: none is evaluated twice, and no more than `limit` are."""

    def __init__(self, loss: Loss, *, limit: int) -> None:
        self.loss, self.limit = loss, limit
        self.losses: dict[Drop, float] = {}
        self.history: list[float] = []

    @property
    def left(self) -> int:
        return self.limit - len(self.losses)

    def add(self, drop_PE: torch.Tensor) -> Scored:
        """Evaluate the sets that are new, as far as the limit allows."""
        new: dict[Drop, int] = {}
        for p, drop in enumerate(_sets(drop_PE)):
            if drop not in self.losses and len(new) < self.left:
                new.setdefault(drop, p)
        if not new:
            return []
        values = _evaluate(self.loss, drop_PE.index_select(0, torch.tensor(list(new.values())))).tolist()
        self.losses.update(zip(new, values, strict=True))
        self.history.append(min(values + self.history[-1:]))
        return list(zip(values, new, strict=True))

    def falls(self) -> list[tuple[int, float]]:
        """Where the best loss fell, in the order of evaluation."""
        lowest = list(accumulate(self.losses.values(), min))
        return [(at + 1, value) for at, value in enumerate(lowest) if at == 0 or value < lowest[at - 1]]

    def best(self, count: int) -> Scored:
        return nsmallest(count, ((value, drop) for drop, value in self.losses.items()))


def _climb(book: _Book, space: Space, batch: int, generator: torch.Generator) -> None:
    """Best-first over single swaps until the book is full."""
    waiting = [(value, drop) for drop, value in book.losses.items()]  # sets whose neighbours are not all known
    heapify(waiting)
    while book.left:
        value, drop = heappop(waiting)
        for chunk_PE in torch.split(_swaps(drop, space, generator), batch):
            new = book.add(chunk_PE)
            for scored in new:
                heappush(waiting, scored)
            if new and min(new)[0] < value:
                heappush(waiting, (value, drop))
                break


def _cross(parent_PE: torch.Tensor, count: int, space: Space, generator: torch.Generator) -> torch.Tensor:
    # Parents come best first, so the smaller of two drawn rows wins the tournament. index_select, because plain
    # indexing wakes every thread for these few kilobytes, and on a busy machine waits for them.
    first_P, second_P = torch.randint(len(parent_PE), (2, count, 2), generator=generator).amin(2)
    noise_PE = torch.rand(count, space.num_experts, generator=generator)
    return _choose(noise_PE + parent_PE.index_select(0, first_P) + parent_PE.index_select(0, second_P), space)


def _mutate(drop_PE: torch.Tensor, probability: float, space: Space, generator: torch.Generator) -> torch.Tensor:
    P, E = drop_PE.shape
    group_E = torch.arange(E) // (E // space.groups)
    movable_E = torch.zeros(E, dtype=torch.bool)  # a group that loses all it can has no outsider to swap in
    movable_E[[e for pool in space.pools() if len(pool) > space.per_group for e in pool]] = True
    swaps_P = torch.randint(1, 4, (P,), generator=generator) * (torch.rand(P, generator=generator) < probability)
    for swap in range(3):
        rows = (swaps_P > swap).nonzero()[:, 0]
        child_PE = drop_PE.index_select(0, rows)
        member_PE = child_PE & movable_E
        leaver_P = torch.rand(member_PE.shape, generator=generator).masked_fill(~member_PE, -1).argmax(1)
        outsider_PE = ~child_PE & movable_E & (group_E == group_E[leaver_P, None])
        joiner_P = torch.rand(member_PE.shape, generator=generator).masked_fill(~outsider_PE, -1).argmax(1)
        drop_PE[rows, leaver_P] = False
        drop_PE[rows, joiner_P] = True
    return drop_PE


def _choose(priority_PE: torch.Tensor, space: Space) -> torch.Tensor:
    """In every group the n unprotected experts of the highest priority (priorities are not negative)."""
    priority_PE[:, list(space.protected)] = -1
    priority_PGM = priority_PE.view(len(priority_PE), space.groups, -1)
    index_PGn = priority_PGM.topk(space.per_group, dim=2).indices
    return torch.zeros_like(priority_PGM, dtype=torch.bool).scatter_(2, index_PGn, True).flatten(1)


def _swaps(drop: Drop, space: Space, generator: torch.Generator) -> torch.Tensor:
    """Every set one swap away, shuffled: one expert out, another of its group in."""
    gone = set(drop)
    pairs = [(a, b) for pool in space.pools() for a in pool if a in gone for b in pool if b not in gone]
    swap_P2 = torch.tensor(pairs, dtype=torch.long).view(-1, 2)[torch.randperm(len(pairs), generator=generator)]
    drop_PE = _masks([drop], space.num_experts).repeat(len(pairs), 1)
    return drop_PE.scatter_(1, swap_P2[:, :1], False).scatter_(1, swap_P2[:, 1:], True)


def _eliminate(loss: Loss, space: Space) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The empty set, then for every single drop its candidates and their losses, best first."""
    drop_E = torch.zeros(space.num_experts, dtype=torch.bool)
    yield drop_E[None], torch.zeros(1, dtype=torch.float64)
    for _ in range(space.per_group):
        waiting = space.pools()  # the groups that have not lost an expert in this round
        while waiting:
            join_P = torch.tensor([e for pool in waiting for e in pool if not drop_E[e]])
            drop_PE = drop_E.repeat(len(join_P), 1).scatter_(1, join_P[:, None], True)
            loss_P, order = _evaluate(loss, drop_PE).sort(stable=True)
            yield drop_PE[order], loss_P
            drop_E = drop_PE[order[0]]
            waiting = [pool for pool in waiting if int(join_P[order[0]]) not in pool]


def _every_set(pools: list[list[int]], per_group: int) -> Iterator[Drop]:
    for head in combinations(pools[0], per_group):
        for tail in _every_set(pools[1:], per_group) if pools[1:] else [()]:
            yield head + tail


def _evaluate(loss: Loss, drop_PE: torch.Tensor) -> torch.Tensor:
    loss_P = torch.cat([loss(chunk_PE) for chunk_PE in torch.split(drop_PE, BATCH)])
    if loss_P.isnan().any():
        bad = _sets(drop_PE)[int(loss_P.isnan().nonzero()[0])]
        raise ValueError(f"The loss of dropping experts {bad} is NaN; the statistics behind it are not finite.")
    return loss_P


def _sets(drop_PE: torch.Tensor) -> list[Drop]:
    """The rows as sorted tuples; all rows drop equally many."""
    columns = drop_PE.nonzero()[:, 1]
    return [tuple(row) for row in columns.view(len(drop_PE), len(columns) // max(len(drop_PE), 1)).tolist()]


def _masks(drops: Sequence[Drop], num_experts: int) -> torch.Tensor:
    index_Pn = torch.tensor(drops, dtype=torch.long).view(len(drops), len(drops[0]) if drops else 0)
    return torch.zeros(len(drops), num_experts, dtype=torch.bool).scatter_(1, index_Pn, True)


def _scored(drop_PE: torch.Tensor, loss_P: torch.Tensor) -> Scored:
    return list(zip(loss_P.tolist(), _sets(drop_PE), strict=True))


def _found(best: Scored, evaluations: int, history: list[float], trace: list[tuple[int, float]]) -> Found:
    losses, drops = zip(*best, strict=True)
    return Found(drops=drops, losses=losses, evaluations=evaluations, history=tuple(history), trace=tuple(trace))
