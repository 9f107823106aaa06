"""Which calibration tokens a layer's search looks at: a seeded sample of all, in which every expert has ENOUGH of its own, or all it has.

All tokens have a rank in one seeded shuffle. A token is taken if it is among the ENOUGH first of one of its experts; the places that are
left go to the first tokens of all. So it may count for many: its weight is one over its chance to be taken, given the order of all others
(the rank conditioning of Cohen and Kaplan, Summarizing data using bottom-k sketches, PODC 2007), and sums over tokens are estimated without
bias. Where places are too few for ENOUGH of every expert, all have to do with as many fewer, and that holds but nearly.

Letters: T calibration tokens, N taken, E experts, k chosen, Q = ENOUGH, S = T k (token, expert) pairs.
"""

from __future__ import annotations

import torch

from trimoe.subset import ROUTED as ENOUGH


def shuffled(tokens: int, seed: int) -> torch.Tensor:
    """Every token's rank, int64 [T]."""
    rank_T = torch.empty(tokens, dtype=torch.int64)
    rank_T[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))] = torch.arange(tokens)
    return rank_T


def choose(
    rank_T: torch.Tensor, index_TK: torch.Tensor, num_experts: int, size: int, enough: int = ENOUGH
) -> tuple[torch.Tensor, torch.Tensor]:
    """(which `size` tokens are taken, in the order of the text; for how many of all tokens each stands, float32). `index_TK`: their experts."""
    tokens = len(rank_T)
    if size >= tokens:
        return torch.arange(tokens), torch.ones(tokens)
    order_T = rank_T.argsort()
    by_rank_TK = index_TK.long()[order_T]
    place_TK = _places(by_rank_TK, num_experts)
    first_T = place_TK.min(1)[0]
    fits = torch.bincount(first_T, minlength=enough)[:enough].cumsum(0) <= size
    enough = int(fits.sum())  # of every expert, at least
    needed_T = first_T < enough
    others = (~needed_T).nonzero().flatten()
    bound = others[size - int(needed_T.sum())]  # the first rank that finds no place
    taken = (needed_T | (torch.arange(tokens) < bound)).nonzero().flatten()
    # A token needed by an expert would be so at any rank before the next of that expert's tokens.
    bound_E = torch.full((num_experts,), tokens)
    row, column = (place_TK == enough).nonzero(as_tuple=True)
    bound_E[by_rank_TK[row, column]] = row
    bound_NK = torch.where(place_TK[taken] < enough, bound_E[by_rank_TK[taken]], bound)
    position, back = order_T[taken].sort()
    return position, (tokens / bound_NK.max(1)[0].clamp_min(bound))[back].float()


def _places(index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Of each pair of a token and an expert, how many tokens before it have that expert."""
    index_S = index_TK.flatten()
    order_S, count_E = index_S.argsort(stable=True), torch.bincount(index_S, minlength=num_experts)
    place_S = torch.empty_like(index_S)
    place_S[order_S] = torch.arange(len(index_S)) - (count_E.cumsum(0) - count_E).repeat_interleave(count_E)
    return place_S.view_as(index_TK)


class Candidates:
    """What is kept of one layer's tokens while a process's batches run by, until it is known which of all are taken: inputs and logits of
    those that may be, twice as many at the most, and the experts of all."""

    def __init__(self, rank_T: torch.Tensor, tokens: int, num_experts: int, size: int):
        """`rank_T`: of the process's own tokens, among `tokens` of all processes."""
        self.rank_T, self.tokens, self.size, self.seen, self.held = rank_T, tokens, size, 0, 0
        self.most = most_held(tokens, num_experts, size)
        # The ENOUGH first ranks of each expert so far.
        self.first_EQ = torch.full((num_experts, ENOUGH), tokens, device=rank_T.device)
        self.batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []  # rows, x_TH, logits_TE, experts of each
        self.index: list[torch.Tensor] = []

    def see(self, x_TH: torch.Tensor, logits_TE: torch.Tensor, index_TK: torch.Tensor) -> None:
        """The next batch."""
        rank_T, index_TK = self.rank_T[self.seen : self.seen + len(x_TH)], index_TK.long()
        self._rank(rank_T, index_TK)
        rows = self._open(rank_T, index_TK).nonzero().flatten()
        self.batches.append((rows + self.seen, x_TH[rows], logits_TE[rows], index_TK[rows]))
        self.index.append(index_TK.int())
        self.seen, self.held = self.seen + len(x_TH), self.held + len(rows)
        if self.held > self.most:
            self._prune()

    def _rank(self, rank_T: torch.Tensor, index_TK: torch.Tensor) -> None:
        count, enough = self.first_EQ.shape
        experts = torch.arange(count, device=index_TK.device)
        expert_S = torch.cat([experts.repeat_interleave(enough), index_TK.flatten()])
        rank_S = torch.cat([self.first_EQ.flatten(), rank_T.repeat_interleave(index_TK.shape[1])])
        order_S = (expert_S * (self.tokens + 1) + rank_S).argsort()
        start_E = torch.searchsorted(expert_S[order_S], experts)
        self.first_EQ = rank_S[order_S][start_E.unsqueeze(1) + torch.arange(enough, device=experts.device)]

    def _open(self, rank_T: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        """Whether each of some tokens may still be taken."""
        return (rank_T < self.size) | (rank_T.unsqueeze(1) <= self.first_EQ[:, -1][index_TK]).any(1)

    def _prune(self) -> None:
        for at, (place, x, logits, index) in enumerate(self.batches):
            rows = self._open(self.rank_T[place], index).nonzero().flatten()
            self.batches[at] = place[rows], x[rows], logits[rows], index[rows]
        self.held = sum(len(place) for place, *_ in self.batches)

    def of(self, batch: int, taken_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(x, logits) of those of a batch that were taken, in order. `taken_T` is bool, of this process's tokens."""
        place, x, logits, _ = self.batches[batch]
        rows = taken_T[place].nonzero().flatten()
        return x[rows], logits[rows]


def most_held(tokens: int, num_experts: int, size: int) -> int:
    """How many tokens' inputs a layer's candidates have, but for those of one batch."""
    return min(tokens, 2 * (size + ENOUGH * num_experts))
