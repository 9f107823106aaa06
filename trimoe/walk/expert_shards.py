"""One layer's experts shared out over processes: each has a stretch of them, with what these were given by all calibration tokens.

A fit then runs on a layer that seems to have these experts alone, and meets the very numbers that one process would.

Letters as in expert_inputs.py; E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from trimoe.model.decision import LayerDecision
from trimoe.model.moe_block import MoeBlock
from trimoe.modeling_trimoe import first_projection
from trimoe.team import Team
from trimoe.walk.expert_inputs import POOL_TOKENS, LayerInputs, LayerSample


@dataclass
class PartSeen(LayerInputs):
    """What the experts of one stretch were given, numbered from 0, beside the whole layer's pool. All other experts have the number after
    the last of these."""

    pool_PH: torch.Tensor

    @cached_property
    def pool(self) -> LayerSample:
        return LayerSample(self.pool_PH.to(self.index_TK.device))


@dataclass
class Share:
    """This process's experts of a layer: `experts` has views of their weights, so that changes in place are changes of the layer."""

    team: Team
    whole: Any
    experts: Any
    site: MoeBlock
    seen: Any
    spans: list[slice]
    own: slice

    @property
    def empty(self) -> bool:
        return self.site.num_experts == 0

    def decision(self, decision: LayerDecision) -> LayerDecision:
        """The layer's decision, about these experts alone."""
        span = self.own
        assert decision.in_ranks is not None and decision.out_ranks is not None
        return replace(decision, keep=decision.keep[span], in_ranks=decision.in_ranks[span], out_ranks=decision.out_ranks[span])

    def complete(self) -> None:
        """Every process has every expert's weights as its owner left them."""
        if self.team.count > 1:
            for parameter in (first_projection(self.whole), self.whole.down_proj):
                self.team.fill(parameter, self.spans)


def share(team: Team, experts: Any, site: MoeBlock, seen: LayerInputs | None, first: int, tokens: int, *, divide: bool = True) -> Share:
    """`seen`: what the experts were given here, tokens `first` on of `tokens` in all. Not divided, each process has all the experts (and the
    main one's weights count)."""
    count = site.num_experts
    if team.count == 1:
        return Share(team, experts, experts, site, seen, [slice(0, count)], slice(0, count))
    spans = [team.span(count, rank) for rank in range(team.count)] if divide else [slice(0, count)] * team.count
    own = spans[team.rank]
    part = _routed(team, seen, spans, first, tokens) if seen is not None else None
    if not divide:
        spans = [slice(0, count), *[slice(0, 0)] * (team.count - 1)]
    return Share(team, experts, narrowed(experts, own, count), replace(site, num_experts=own.stop - own.start), part, spans, own)


def narrowed(experts: Any, span: slice, count: int) -> Any:
    """The experts module with a stretch of its experts: the same memory."""
    own = copy.copy(experts)
    own._parameters = {
        name: nn.Parameter(parameter.data[span], requires_grad=False) if parameter is not None and len(parameter) == count else parameter
        for name, parameter in experts._parameters.items()
    }
    own.num_experts = span.stop - span.start
    return own


def _routed(team: Team, seen: LayerInputs, spans: Sequence[slice], first: int, tokens: int) -> PartSeen:
    """Every token's input goes to the processes that own experts of its choice; every so-many-th goes to all, as the layer's pool."""
    goes = [((seen.index_TK >= span.start) & (seen.index_TK < span.stop)).any(1) for span in spans]
    x, index, weight = (
        team.exchanged([tensor[mask.to(tensor.device)].to(mask.device) for mask in goes])
        for tensor in (seen.x_TH, seen.index_TK.contiguous(), seen.weight_TK.contiguous())
    )
    own = spans[team.rank]
    mine = (index >= own.start) & (index < own.stop)
    step = max(1, tokens // POOL_TOKENS)
    pool = torch.cat(team.everyone(seen.x_TH[-first % step :: step])).to(x.device)
    return PartSeen(x, torch.where(mine, index - own.start, own.stop - own.start), weight, pool)


# ---- the fits, on each process's share, put together
