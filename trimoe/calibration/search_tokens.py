"""Which calibration tokens a layer's search looks at: a seeded sample of all, in which every expert has ENOUGH of its own, or all it has.

All tokens have a rank in one seeded shuffle. A token is taken if it is among the ENOUGH first of one of its experts; the places that are
left go to the first tokens of all. So it may count for many: its weight is one over its chance to be taken, given the order of all others
(the rank conditioning of Cohen and Kaplan, Summarizing data using bottom-k sketches, PODC 2007), and sums over tokens are estimated without
bias. Where places are too few for ENOUGH of every expert, all have to do with as many fewer, and that holds but nearly.

Letters: T calibration tokens, N taken, E experts, k chosen, Q = ENOUGH, S = T k (token, expert) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trimoe.errors import UserError
from trimoe.model.moe_block import MoeBlock
from trimoe.model.router import RoutingRule

FEWEST = 16  # search tokens
USUAL = 4096  # search tokens, where the recipe does not say
ENOUGH = 64  # search tokens that an expert should have been chosen for
MEAN = 4 * ENOUGH  # that a mean expert is to have, so that those have enough that are chosen a quarter as often


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


def search_wanted(sites: Sequence[MoeBlock], tokens: int | None) -> int:
    """How many search tokens are asked for: `tokens`, or where that is None USUAL, and more if a mean expert would have fewer than MEAN."""
    return tokens if tokens is not None else max(USUAL, *(math.ceil(MEAN * site.num_experts / site.rule.top_k) for site in sites))


def search_budget(sites: Sequence[MoeBlock], reach: int, tokens: int | None, memory: float) -> int:
    """How many search tokens are taken: those wanted, but no more than fit: each keeps a Gram of `reach` x `reach` float32, those of one
    layer in `memory` GiB. Raises UserError where they would be too few to search by."""
    if not reach:
        return 0
    each = max(gram_bytes([site], reach) for site in sites)
    fits = int(memory * 2**30 / each)
    if fits < FEWEST:
        raise UserError(
            f"search_memory {memory} GiB holds the expert products of {fits} search tokens in a layer, and {FEWEST} are the least to search by; "
            f"set calibration.search_memory to {each * FEWEST / 2**30:.2g} or more."
        )
    return min(search_wanted(sites, tokens), fits)


def gram_bytes(sites: Sequence[MoeBlock], reach: int) -> int:
    """Bytes that one search token takes in all MoE layers together."""
    return sum(4 * gram_side(site, reach) ** 2 for site in sites)


def search_tensors(site: MoeBlock, reach: int, tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is kept of one layer's search tokens: shapes and dtypes by name."""
    side = gram_side(site, reach)
    return {
        "logits_TE": ((tokens, site.num_experts), torch.float32), "order_TM": ((tokens, side), torch.int64),
        "gram_TMM": ((tokens, side, side), torch.float32), "weight_T": ((tokens,), torch.float32),
    }  # fmt: skip


def gram_side(site: MoeBlock, reach: int) -> int:
    """Among how many experts one layer's Gram is, where `reach` are wanted: k and as many as may be dropped, from all groups alike."""
    rule, count = site.rule, site.num_experts
    if rule.ordered:
        return min(reach, count)
    if not rule.ordered_groups:
        return count
    return min(count, rule.groups * (in_group(rule) + math.ceil((reach - rule.top_k) / rule.groups)))


def in_group(rule: RoutingRule) -> int:
    """How many survivors of a group are looked at, at most: those chosen, and two that a group may be chosen by."""
    return max(rule.top_k, 2)
