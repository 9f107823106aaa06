"""Attention kept within documents that share a sample: the masks of captured layer calls, narrowed, and a look whether that is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trimoe.model.layer_call import Call


def narrowed(value: Any, same_BLL: torch.Tensor, made: dict[int, torch.Tensor]) -> Any:
    """A layer's call whose masks hide all other documents too, as most models make them of the positions themselves; layers that share a
    mask go on sharing it (`made`, by the mask that it was)."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 4 or value.shape[-2:] != same_BLL.shape[-2:]:
            return value
        if id(value) not in made:
            made[id(value)] = value & same_BLL if value.dtype == torch.bool else value.masked_fill(~same_BLL, torch.finfo(value.dtype).min)
        return made[id(value)]
    if isinstance(value, dict):
        return {name: narrowed(one, same_BLL, made) for name, one in value.items()}
    return type(value)(narrowed(one, same_BLL, made) for one in value) if type(value) in (list, tuple) else value


def apart(call: Call, positions_BL: torch.Tensor) -> bool:
    """Whether a layer is called with a mask that hides, from a document's first token, the token before it, and with positions that start
    again there."""
    length = positions_BL.shape[1]
    row_S, place_S = (positions_BL[:, 1:] == 0).nonzero(as_tuple=True)
    masks = [one for one in _tensors(call) if one.dim() == 4 and one.shape[-2:] == (length, length)]
    turns = [one for one in _tensors(call) if one.dim() == 3 and one.shape[:2] == positions_BL.shape and one.is_floating_point()]
    hidden = [_masked(one.expand(len(positions_BL), -1, -1, -1)[row_S, 0, place_S + 1, place_S]) for one in masks]
    again = [torch.equal(one[row_S, place_S + 1], one[row_S, 0]) for one in turns]
    return bool(masks) and all(bool(one.all()) for one in hidden) and all(again)


def _masked(values: torch.Tensor) -> torch.Tensor:
    """Where a mask hides: False, or a number that leaves nothing after the softmax."""
    return ~values if values.dtype == torch.bool else values < -1e4


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
