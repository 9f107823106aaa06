"""Packed integers against compressed-tensors' own packing, and a packed checkpoint read as the dense one it stands for."""

from __future__ import annotations

import pytest
import torch

from trimoe.checkpoint.packed import Packed, pack, unpack

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 64), (3, 24), (7, 33), (2, 129)])
def test_packs_as_compressed_tensors_does(bits: int, rows: int, columns: int) -> None:
    q_OI = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=torch.Generator().manual_seed(columns)).to(
        torch.int8
    )
    words = pack(q_OI, bits)
    assert torch.equal(words, helpers.pack_to_int32(q_OI, bits))
    assert torch.equal(unpack(words, bits, columns), q_OI)
    assert torch.equal(helpers.unpack_from_int32(words, bits, torch.Size([rows, columns])), q_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_integer_times_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q_OI = torch.randint(-8, 8, (6, 32), generator=generator).to(torch.int8)
    scale_OG = torch.rand(6, 4, generator=generator).to(dtype)
    expected = torch.stack([torch.stack([q_OI[o, i].to(dtype) * scale_OG[o, i // 8] for i in range(32)]) for o in range(6)])
    assert torch.equal(Packed(q_OI, scale_OG, 4, 8).dense(), expected)
