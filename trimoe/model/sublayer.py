"""How a decoder layer's MoE sub-layer hangs on the residual stream, found by running a hollow copy of the layer. No weight is read.

Norms get random weights; attention and everything else beside the MoE block answer with zeros, and so does the block. What comes out
is the input again exactly where leaving the sub-layer out is the identity (Layer Drop, arXiv 2406.02500, needs that).
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimoe.errors import FOREIGN, UserError, stop_if_told
from trimoe.model import depth_config
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton

WAYS = ("pair", "tensor", "triple")  # what an attention, a recurrent or an older attention module returns


@dataclass(frozen=True)
class SubLayer:
    """`norm`: the child of the layer whose output the block is given; `pair`: the block returns (hidden, None) rather than hidden."""

    norm: str
    pair: bool


class _Hollow(nn.Module):
    def __init__(self, way: str):
        super().__init__()
        self.way, self.seen = way, torch.empty(0)

    def forward(self, hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        given = hidden_states if hidden_states is not None else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        self.seen = given
        zeros = torch.zeros_like(given)
        return {"tensor": zeros, "pair": (zeros, None), "triple": (zeros, None, None)}[self.way]


@torch.no_grad()
def sublayer(skeleton: Skeleton, index: int) -> SubLayer:
    """Raises UserError where dropping the layer's MoE sub-layer would not leave the residual stream as it is."""
    site = skeleton.sites[index]
    where = f"layer_drop: layer {index} of {skeleton.name} ({skeleton.config.model_type})"
    for pair in (False, True):
        for way in WAYS:
            found = _try(skeleton.layers[index], site, pair, way)
            if found is None:
                continue
            norm, same = found
            if not same:
                raise UserError(
                    f"{where} does not add its MoE block to an unchanged residual stream (its input is normed or scaled on the way), so "
                    "dropping the block would change more than the block; use block_drop or expert_drop."
                )
            if norm is None:
                raise UserError(f"{where} has no norm that feeds the MoE block alone; not supported yet.")
            return SubLayer(norm, pair)
    raise UserError(f"{where} could not be run without its parts; not supported yet.")


def _try(pristine: nn.Module, site: MoeBlock, pair: bool, way: str) -> tuple[str | None, bool] | None:
    layer = copy.deepcopy(pristine)
    generator = torch.Generator().manual_seed(0)
    made: dict[int, str] = {}
    keep = []  # outputs stay alive, so that their identities stay theirs

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            made[id(output)] = name
            keep.append(output)

        return hook

    block, others = _Hollow("pair" if pair else "tensor"), []
    for name, child in list(layer.named_children()):
        if name == site.block:
            setattr(layer, name, block)
        elif all(p.dim() == 1 for p in child.parameters()) and list(child.parameters()):
            child.to_empty(device="cpu").float()
            for parameter in child.parameters():
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
            child.register_forward_hook(remember(name))
        elif list(child.parameters()):
            others.append(_Hollow(way))
            setattr(layer, name, others[-1])
    x = torch.randn(1, 3, site.hidden, generator=generator)
    arguments = {
        name: None
        for name, p in inspect.signature(layer.forward).parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty and name != "hidden_states"
    }
    try:
        out = layer(hidden_states=x, **arguments)
    except FOREIGN as error:
        stop_if_told(error)
        return None
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, torch.Tensor) or out.shape != x.shape:
        return None
    if any(other.seen is block.seen for other in others):
        return None, True  # the norm feeds something else as well
    return made.get(id(block.seen)), bool(torch.equal(out, x))


def _like_first(skeleton: Skeleton, index: int) -> SubLayer:
    """As in the first layer that is like this one; where that raises, this layer's own error says its number."""
    like = depth_config.first_alike(skeleton)[index]
    if like != index and like in skeleton.sites:
        try:
            return skeleton.remembered(("sublayer", like), lambda: sublayer(skeleton, like))
        except UserError:
            pass
    return sublayer(skeleton, index)


def dropped_entry(skeleton: Skeleton, index: int) -> dict[str, Any]:
    """What `modeling_trimoe.drop_block` has to know about a layer: JSON."""
    found = skeleton.remembered(("sublayer", index), lambda: _like_first(skeleton, index))
    return {"guard": skeleton.sites[index].router_paths()[0], "norm": found.norm, "pair": found.pair}
