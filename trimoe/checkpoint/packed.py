"""Integers of 4 or 8 bits packed into int32 words, as compressed-tensors' `pack-quantized` stores them, symmetric, in groups.

    https://github.com/vllm-project/compressed-tensors (pack_quantized). A matrix W [O, I] lies on disk as weight_packed int32
    [O, I bits / 32], weight_scale [O, G] and weight_shape int64 [2]; value = (unsigned field - 2^(bits - 1)) * its group's scale.

Letters: O outputs, I inputs of a matrix, G groups along I.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PARTS = ("weight_packed", "weight_scale", "weight_shape")
BITS = (4, 8)


@dataclass(frozen=True)
class Packed:
    """One quantised matrix: q_OI int8 within [-2^(bits-1), 2^(bits-1) - 1], scale_OG in the model's dtype, `group` inputs a scale."""

    q_OI: torch.Tensor
    scale_OG: torch.Tensor
    bits: int
    group: int

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """q * scale [O, I], computed in the scales' dtype, as compressed-tensors does."""
        wide = self.q_OI.to(self.scale_OG.dtype).unflatten(1, (-1, self.group)) * self.scale_OG.unsqueeze(-1)
        return wide.flatten(1).to(dtype or self.scale_OG.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The three tensors on disk, by the last part of their names."""
        shape = torch.tensor(self.q_OI.shape, dtype=torch.int64)
        return dict(zip(PARTS, (pack(self.q_OI, self.bits), self.scale_OG, shape), strict=True))


def packed_columns(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def pack(q_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """int8 [O, I] -> int32 [O, ceil(I bits / 32)]; the first value lies in the lowest bits."""
    columns = q_OI.shape[1]
    fields = (q_OI.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    fields = torch.nn.functional.pad(fields, (0, packed_columns(columns, bits) * (32 // bits) - columns))
    if bits == 4:
        fields = fields[:, 0::2] | (fields[:, 1::2] << 4)
    return fields.contiguous().view(torch.int32)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 [O, W] -> int8 [O, columns]."""
    fields = words.contiguous().view(torch.uint8)
    if bits == 4:
        fields = torch.stack([fields & 15, fields >> 4], dim=-1).flatten(1)
    return (fields[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
