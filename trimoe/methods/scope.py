"""Which matrices beside the routed experts a step compresses, by its `scope`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trimoe.methods import Quantize, WeightPrune
from trimoe.model.decision import Decisions
from trimoe.model.linears import linears
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton


def with_linears(skeleton: Skeleton, decisions: Decisions, step: Quantize | WeightPrune, sites: Mapping[int, MoeBlock]) -> Decisions:
    """`decisions` with the linears that the step's `scope` has beside the experts of `sites`: "moe" shared experts, "all-linear" all matrices
    of the decoder layers. Layers without experts take over the bits or zeros that the others have."""
    if step.scope == "experts":
        return decisions
    like = next(decision for decision in decisions.values() if decision.changed)
    plain = replace(like, keep=(), in_ranks=None, out_ranks=None, separate=False, merged=False)
    out = dict(decisions)
    for index in range(len(skeleton.layers)):
        decision = decisions.get(index)
        if decision is not None and decision.gone == "block":
            continue
        gone = decision is not None and decision.gone is not None
        found = linears(skeleton, index, block=not gone)
        paths = tuple(
            path
            for path, module in found.items()
            if step.takes(sites.values(), module) and (step.scope == "all-linear" or _inside(skeleton, index, path))
        )
        if paths:
            base = plain if decision is None else replace(plain, gone=decision.gone, keep=decision.keep) if gone else decision
            out[index] = replace(base, linears=paths)
    return out


def _inside(skeleton: Skeleton, index: int, path: str) -> bool:
    return index in skeleton.sites and path.startswith(skeleton.sites[index].block + ".")
