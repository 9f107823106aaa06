"""The fits of low_rank, quantize and weight_prune on experts that are shared out over processes, put together."""

from __future__ import annotations

from typing import Any

import torch

from trimoe.methods import LowRank, Quantize, WeightPrune
from trimoe.methods.quantize.quantize import QuantizedLayer
from trimoe.model.decision import LayerDecision
from trimoe.modeling_trimoe import FactoredExperts
from trimoe.walk.expert_shards import Share


@torch.no_grad()
def factored(part: Share, step: LowRank, decision: LayerDecision) -> Any:
    """The layer's experts, factored; the same experts where the factors were multiplied out."""
    team, whole = part.team, part.whole
    new = None if part.empty else step.transform(part.experts, part.site, part.decision(decision), part.seen)
    if decision.merged:
        part.complete()
        return whole
    if team.count == 1:
        return new
    assert decision.in_ranks is not None and decision.out_ranks is not None
    made = team.everyone({} if new is None else dict(new.named_parameters(recurse=False)))
    out = FactoredExperts(whole, list(decision.in_ranks), list(decision.out_ranks), decision.separate)
    for name, parameter in out.named_parameters(recurse=False):
        if not name.endswith("_bias"):  # biases are the experts' own
            parameter.copy_(torch.cat([own[name] for own in made if name in own]))
    return out


def quantized(part: Share, step: Quantize, group: int, dtype: torch.dtype) -> QuantizedLayer:
    """The integers of all the layer's experts."""
    own = QuantizedLayer() if part.empty else step.transform(part.experts, part.site, part.seen, group, dtype)
    out = QuantizedLayer()
    for other in part.team.everyone(own):
        out.first += other.first
        out.last += other.last
        out.borrowed += other.borrowed
    return out


def pruned(part: Share, step: WeightPrune) -> dict[str, Any]:
    """Prunes all the layer's experts in place; what there is to know about it: counts added up, shares averaged."""
    own = {} if part.empty else step.transform(part.experts, part.site, part.seen)
    part.complete()
    count = part.whole.num_experts
    sizes = [span.stop - span.start for span in part.spans]
    rows = [(size, about) for size, about in zip(sizes, part.team.everyone(own), strict=True) if size]
    if len(rows) == 1:
        return rows[0][1]
    return {
        name: sum(about[name] for _, about in rows) if isinstance(value, int) else sum(size * about[name] for size, about in rows) / count
        for name, value in rows[0][1].items()
    }
