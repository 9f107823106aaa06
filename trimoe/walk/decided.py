"""A decoder layer as the decisions leave it: loaded layers lose experts, or run as if they had lost them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimoe.model.decision import Decisions, decided_site
from trimoe.model.moe_block import MoeBlock, keep_experts
from trimoe.model.skeleton import Skeleton
from trimoe.model.sublayer import dropped_entry
from trimoe.modeling_trimoe import drop_block


def prune_layer(skeleton: Skeleton, index: int, layer: nn.Module, decisions: Decisions | None) -> MoeBlock | None:
    """Apply what was decided about experts and the MoE block to a loaded layer; returns the site as it is then, None where there is no
    MoE block (any more)."""
    site, decision = skeleton.sites.get(index), (decisions or {}).get(index)
    if site is None or decision is None:
        return site
    if decision.gone == "moe":
        drop_moe(skeleton, index, layer)
        return None
    if len(decision.keep) < site.num_experts:
        keep_experts(site.block_of(layer), site, decision.keep)
    return decided_site(site, decision)


def drop_moe(skeleton: Skeleton, index: int, layer: nn.Module) -> None:
    """Take the MoE block and its norm out of a loaded layer."""
    site = skeleton.sites[index]
    drop_block(layer, site.block, **dropped_entry(skeleton, index))


@contextmanager
def masked(layer: nn.Module, site: MoeBlock, drop: tuple[int, ...]) -> Iterator[None]:
    """Run `layer` as if the experts of `drop` did not exist: its router's decisions are replaced by the rule's among the others."""
    if not drop:
        yield
        return
    router = site.router_of(layer)
    device = next(router.parameters()).device
    keep_E = torch.ones(site.num_experts, dtype=torch.bool, device=device)
    keep_E[list(drop)] = False
    bias_E = site.bias_of(layer)

    def reroute(module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, weights, indices = output
        new_weights, new_indices = site.rule.route(logits.float(), bias_E, keep_E)
        return logits, new_weights.to(weights.dtype), new_indices.to(indices.dtype)

    handle = router.register_forward_hook(reroute)
    try:
        yield
    finally:
        handle.remove()
