"""One tensor of the output, and the other forms that a matrix may take there: packed integers, zeros left out.

A pruned tensor in `bitmask` form lies as its kept values in row order [count], under the name that the dense one would have (stock code
meets a shape that it rejects), and one bit a weight, uint8 [..., I / 8], lowest bit first, under that name with `_bitmask`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch

from trimoe.checkpoint.headers import DTYPES
from trimoe.checkpoint.packed import PARTS, Packed, packed_columns, unpack
from trimoe.methods.weight_prune.masks import dropped_of
from trimoe.model.decision import LayerDecision
from trimoe.modeling_trimoe import BITMASK, expand


class Entry(NamedTuple):
    """One tensor of the output. `source`: the checkpoint key it is copied from, with rows `keep` along `axis` if those are set;
    without a source it is made by a transformation, or is all `zeros`. `stands_for`: parameters, where they are not its numbers."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: str | None = None
    axis: int | None = None
    keep: tuple[int, ...] = ()
    zeros: bool = False
    stands_for: int | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape) if self.stands_for is None else self.stands_for

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Group(list[Entry]):
    """Entries that go together, and are not changed any more."""

    @cached_property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self)

    @cached_property
    def parameters(self) -> int:
        return sum(entry.parameters for entry in self)


def changed(entry: Entry, decision: LayerDecision, inputs: int) -> list[Entry]:
    """What lies in the place of matrices of so many `inputs` a row that quantize or weight_prune has worked on."""
    if decision.bits is not None:
        assert decision.group is not None
        base, (rows, columns) = entry.key.removesuffix("weight"), entry.shape
        shapes = ((rows, packed_columns(columns, decision.bits)), (rows, columns // decision.group), (2,))
        parts = zip(PARTS, ("I32", entry.dtype, "I64"), shapes, (rows * columns, 0, 0), strict=True)
        return [Entry(base + part, dtype, shape, stands_for=count) for part, dtype, shape, count in parts]
    if not decision.bitmask:
        return [entry._replace(source=None, axis=None, keep=())]
    rows, columns = math.prod(entry.shape[:-1]), entry.shape[-1]
    kept = rows * columns // inputs * kept_of(inputs, decision)
    return [
        Entry(entry.key, entry.dtype, (kept,), stands_for=rows * columns),
        Entry(entry.key + BITMASK, "U8", (*entry.shape[:-1], columns // 8), stands_for=0),
    ]


def kept_of(inputs: int, decision: LayerDecision) -> int:
    """How many of a row's weights stay."""
    if decision.pattern is not None:
        keep, of = decision.pattern
        return inputs // of * keep
    assert decision.sparsity is not None
    return inputs - dropped_of(inputs, decision.sparsity)


def squeezed(key: str, tensor: torch.Tensor, entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """A pruned tensor in the form that `entries` (by key) have room for: as it is, or its kept values and their bitmask.

    Weights that were zero before pruning count as kept as far as there is room: earlier ones first.
    """
    if key + BITMASK not in entries:
        return {key: tensor}
    flat = tensor.flatten()
    kept = flat != 0
    spare = (~kept).nonzero()[: entries[key].shape[0] - int(kept.sum())]
    kept[spare[:, 0]] = True
    bits = kept.view(*tensor.shape[:-1], -1, 8).to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=tensor.device)
    return {key: flat[kept], key + BITMASK: bits.sum(-1, dtype=torch.uint8)}


def dense_back(tensors: Mapping[str, torch.Tensor], bits: int | None) -> dict[str, torch.Tensor]:
    """The dense tensors that written ones stand for, by the keys that those would have."""
    out = {}
    for key, tensor in tensors.items():
        base, _, part = key.rpartition(".")
        if part == PARTS[0]:
            assert bits is not None
            scale_OG, columns = tensors[f"{base}.{PARTS[1]}"], int(tensors[f"{base}.{PARTS[2]}"][1])
            out[f"{base}.weight"] = Packed(unpack(tensor, bits, columns), scale_OG, bits, columns // scale_OG.shape[1]).dense()
        elif part not in PARTS and not key.endswith(BITMASK):
            mask = tensors.get(key + BITMASK)
            out[key] = tensor if mask is None else expand(tensor, mask)
    return out
