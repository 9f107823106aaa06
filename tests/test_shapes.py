"""What is spared for large models' sake, beside the slow way of finding the same."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from trimoe.model import depth_config, sublayer, transformers5
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout


@pytest.mark.parametrize("parts", [("up", "down"), ("w1", "w2"), ("w1.0", "w2")])
@pytest.mark.parametrize("by_part", [False, True])
def test_experts_keys_are_renamed_as_one_by_one(parts: tuple[str, str], by_part: bool) -> None:
    """Whatever order they come in, and with numbers in the names of the matrices."""
    order = [(e, part) for part in parts for e in range(5)] if by_part else [(e, part) for e in range(5) for part in parts]
    keys = [f"m.layers.{layer}.mlp.experts.{e}.{part}.weight" for layer in (0, 1) for e, part in order]
    keys += ["m.norm.weight", "m.layers.0.norm.weight", *(f"m.layers.0.heads.{head}.bias" for head in range(4)), "experts.3.up"]
    asked: list[str] = []

    def rename(key: str) -> tuple[str, str]:
        asked.append(key)
        head, mark, rest = key.partition(".experts.")
        return (f"{head}.stack.{rest.split('.')[1]}", rest.split(".", 1)[1]) if mark else (key.upper(), "")

    slow = [(key, rename(key)) for key in keys]
    asked.clear()
    assert list(transformers5._renamed(keys, rename)) == slow
    if parts == ("up", "down") or parts == ("w1", "w2"):  # two of each layer and matrix; whatever keeps its number is always asked about
        assert len([key for key in asked if "mlp" in key]) == 8 and len(asked) == len(keys) - 12


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.int64])
def test_many_zeros_are_zeros(dtype: torch.dtype | None) -> None:
    size = transformers5.FILLED // 2
    with transformers5._NothingLarge():
        found = torch.zeros(2, size, dtype=dtype)
    slow = torch.zeros(2, size, dtype=dtype)
    assert found.dtype == slow.dtype and torch.equal(found, slow)
    found += 1
    assert bool((found == 1).all())


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "jamba"])
def test_layers_that_are_alike(family: str, tmp_path: Path) -> None:
    """Two layers are alike exactly where their entries are the same under one number, and leaving the block out is worked out once for them."""
    families.save(family, tmp_path)
    skeleton = Skeleton.of(str(tmp_path))
    layout = Layout(skeleton, unchanged(skeleton.sites)).examined()
    forms = [
        ({(entry.key.replace(f"layers.{i}.", "layers."), entry.dtype, entry.shape) for entry in layout.groups[i + 1]}, i in skeleton.sites)
        for i in range(len(skeleton.layers))
    ]
    assert skeleton.alike == [forms.index(form) for form in forms]
    assert all(
        index in skeleton.sites or skeleton.alike[like] == skeleton.alike[index]
        for index, like in depth_config.first_alike(skeleton).items()
    )
    for index in skeleton.sites:
        found = sublayer.sublayer(skeleton, index)
        entry = sublayer.dropped_entry(skeleton, index)
        assert (entry["norm"], entry["pair"]) == (found.norm, found.pair)
