"""What keeps engines that know the stock architecture from reading a native folder wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import trimoe
from trimoe.checkpoint.folder import INDEX
from trimoe.modeling_trimoe import GUARD, KEY

Folder = Callable[[str], Path]
UNEVEN: dict[str, Any] = {"expert_drop": {"ratio": 0.2, "counts": "optimal", "search": "greedy"}}
EVEN: dict[str, Any] = {"expert_drop": {"ratio": 0.25, "counts": "uniform"}}
NATIVE: dict[str, list[dict[str, Any]]] = {
    "counts": [UNEVEN],
    "factored": [{"low_rank": {"ratio": 0.3, "alpha": 0.0}}],
    "both": [UNEVEN, {"low_rank": {"ratio": 0.3, "alpha": 0.0}}],
    "dropped": [{"layer_drop": {"count": 1}}],
    "fewer-layers": [{"block_drop": {"count": 1}}, {"low_rank": {"ratio": 0.3, "alpha": 0.0}}],
    "bitmask": [{"weight_prune": {"ratio": 0.5, "form": "bitmask", "score": "magnitude"}}],
    "packed": [{"layer_drop": {"count": 1}}, {"quantize": {"bits": 4, "method": "round"}}],
}


def made(source: Path, text: Path, out: Path, steps: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors of a compressed folder whose plan said its bytes exactly."""
    result = trimoe.compress(source, {"steps": steps}, out, calibration=[str(text)], samples=2, length=32)
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return tensors(out)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("form", NATIVE)
def test_every_native_form_has_it_in_every_layer(form: str, family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    found = made(family_folder("mixtral"), text_file, tmp_path / "out", NATIVE[form])
    about = config(tmp_path / "out")
    layers = range(about["num_hidden_layers"])
    assert {key for key in found if GUARD in key} == {f"model.layers.{index}.{GUARD}" for index in layers}
    assert about["architectures"] == ["TrimoeMixtralForCausalLM"] and about[KEY]["guard"] == GUARD
    assert about["auto_map"] == {"AutoModelForCausalLM": "modeling_trimoe.TrimoeMixtralForCausalLM"}
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "mixtral"
    trimoe.load(tmp_path / "out")(torch.arange(8)[None])


def test_results_of_recover_and_sweep_have_it(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    source, out = family_folder("mixtral"), tmp_path / "out"
    made(source, text_file, out, NATIVE["factored"])
    spec = {"method": "router", "data": str(text_file), "samples": 8, "length": 16, "steps": 1, "holdout": 0.25}
    trimoe.recover(out, tmp_path / "trained", spec)
    found = trimoe.sweep(
        source, {"steps": NATIVE["counts"]}, tmp_path / "sweep", changes=["steps.0.ratio=[0.2]"], calibration=[str(text_file)], samples=2, length=32,
        text=[str(text_file)], tokens=64, keep="all",
    )  # fmt: skip
    for folder in (tmp_path / "trained", *(path.parent for path in (tmp_path / "sweep").glob("*/config.json"))):
        about = config(folder)
        assert {f"model.layers.{index}.{GUARD}" for index in range(about["num_hidden_layers"])} <= set(tensors(folder))
        assert about["architectures"] == ["TrimoeMixtralForCausalLM"] and about[KEY]["guard"] == GUARD
    assert len(found.rows) == 1


def test_saved_again_by_transformers_it_is_still_there(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    made(family_folder("mixtral"), text_file, tmp_path / "out", NATIVE["factored"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert config(tmp_path / "again")["architectures"] == ["TrimoeMixtralForCausalLM"]
    assert any(key.endswith(GUARD) for key in tensors(tmp_path / "again"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(again(torch.arange(8)[None]).logits, trimoe.load(tmp_path / "out")(torch.arange(8)[None]).logits)


def test_stock_forms_have_none(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    """Nor has a stock result that is made of a native one, whose guard it leaves behind."""
    made(family_folder("mixtral"), text_file, tmp_path / "native", NATIVE["bitmask"])
    for source, out in ((family_folder("mixtral"), tmp_path / "stock"), (tmp_path / "native", tmp_path / "stock again")):
        assert not any(GUARD in key for key in made(source, text_file, out, [EVEN]))
        assert config(out)["architectures"] == ["MixtralForCausalLM"] and KEY not in config(out) and "auto_map" not in config(out)


def test_folders_made_before_there_was_one_still_load(family_folder: Folder, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(family_folder("mixtral"), text_file, out, NATIVE["both"])
    new = trimoe.load(out)(torch.arange(8)[None]).logits
    about, (file,) = config(out), out.glob("*.safetensors")
    save_file({key: tensor for key, tensor in load_file(file).items() if GUARD not in key}, file, metadata={"format": "pt"})
    (out / INDEX).unlink()
    file.rename(out / "model.safetensors")
    del about[KEY]["guard"]
    about |= {"architectures": ["MixtralForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_trimoe.MixtralForCausalLM"}}
    (out / "config.json").write_text(json.dumps(about))
    for model in (trimoe.load(out), AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)):
        torch.testing.assert_close(model(torch.arange(8)[None]).logits, new)
    assert not any(GUARD in key for key in tensors(out))
    assert trimoe.inspect(str(out))
    kept = made(out, text_file, tmp_path / "twice", [{"block_drop": {"count": 1}}])
    assert any(GUARD in key for key in kept)
