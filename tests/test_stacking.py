"""Experts read straight into their stacked tensor are what transformers' loader makes of the same files."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from trimoe.checkpoint import folder
from trimoe.model.skeleton import Skeleton
from trimoe.walk.walk import LayerWalk

STORED_STACKED = ("gpt_oss", "granitemoe")


def weights(walk: LayerWalk, index: int) -> dict[str, torch.Tensor]:
    with walk.layer(index) as layer:
        return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_layers_equal_those_of_the_stock_loader(family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.save(family, tmp_path, dtype=dtype)
    monkeypatch.setattr(folder, "PIECE", 300)  # a few rows: pieces of a matrix that do not divide it
    for computed in (torch.float32, torch.bfloat16):
        skeleton = Skeleton.of(str(tmp_path), computed)
        found, walk = skeleton.conversion.stacked, LayerWalk(skeleton, [torch.arange(3, 19)[None]])
        assert bool(found) == (family not in STORED_STACKED)
        for index in range(len(walk)):
            skeleton.conversion.stacked = found
            ours = weights(walk, index)
            skeleton.conversion.stacked = {}
            stock = weights(walk, index)
            assert ours.keys() == stock.keys()
            for name, tensor in ours.items():
                assert tensor.dtype == stock[name].dtype and torch.equal(tensor, stock[name]), (index, name)
