"""Heads and embeddings, one tensor or two: as transformers has it, whatever the configuration says. And what trainers leave switched on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.walk.walk import LayerWalk

IDS = torch.arange(3, 35).view(2, 16)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
STEPS: dict[str, list[dict[str, Any]]] = {
    "experts": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "frequency"}}],
    "block": [{"block_drop": {"count": 1}}],
    "integers": [{"quantize": {"bits": 8, "method": "round"}}],
}


def saved(folder: Path, form: str, **changes: Any) -> Path:
    """A tiny model whose configuration ties its head: one table is stored, or both, equal or not, or the head's alone."""
    families.save("mixtral", folder, shard="1GB", tie_word_embeddings=True, **changes)
    tensors = load_file(folder / "model.safetensors")
    if form in ("equal", "different", "head alone"):
        tensors[HEAD] = tensors[TABLE].clone()
    if form == "different":
        tensors[HEAD] += torch.randn(tensors[HEAD].shape, generator=torch.Generator().manual_seed(1)) * 0.3
    if form == "head alone":
        del tensors[TABLE]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@torch.no_grad()
def walked(folder: Path) -> torch.Tensor:
    walk = LayerWalk(Skeleton.of(str(folder)), [IDS[:1], IDS[1:]])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head:
        return torch.cat([head(hidden, batch) for batch, hidden in enumerate(walk.hidden)])


@pytest.mark.parametrize("form", ["table alone", "equal", "different", "head alone"])
def test_the_walk_has_the_head_that_transformers_has(form: str, tmp_path: Path, text_file: Path) -> None:
    folder = saved(tmp_path / "model", form)
    truth = logits(folder)
    torch.testing.assert_close(walked(folder), truth, atol=2e-5, rtol=1e-4)
    for name, steps in STEPS.items() if form == "different" else [("experts", STEPS["experts"])]:
        out = trimoe.compress(folder, {"steps": steps}, tmp_path / name, calibration=[str(text_file)], samples=2, length=32).out
        held = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert held is (form != "different")
        tables = {key: tensor for path in out.glob("*.safetensors") for key, tensor in load_file(path).items() if key in (HEAD, TABLE)}
        assert tables.keys() == {"table alone": {TABLE}, "head alone": {HEAD}}.get(form, {HEAD, TABLE})
        loaded = trimoe.load(out, dtype=torch.float32) if name == "integers" else AutoModelForCausalLM.from_pretrained(out)
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is (form != "different")
        exact = {"backend": "dequantize"} if name == "integers" else {}
        with torch.no_grad():
            torch.testing.assert_close(walked(out), trimoe.load(out, dtype=torch.float32, **exact)(IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["equal", "different", "head alone"])
def test_training_writes_both_or_one(form: str, tmp_path: Path, text_file: Path) -> None:
    """Two equal tables of which one alone were written would no longer be tied."""
    folder = saved(tmp_path / "model", form)
    small = trimoe.compress(folder, {"steps": STEPS["experts"]}, tmp_path / "small", calibration=[str(text_file)], samples=2, length=32).out
    spec = {
        "method": "logits",
        "train": "full",
        "steps": 2,
        "samples": 4,
        "length": 32,
        "rate": 0.001,
        "batch": 2,
        "data": [str(text_file)],
    }
    out = trimoe.recover(small, tmp_path / "out", spec).out
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (small, out))
    assert before.keys() == after.keys()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is (form != "different")
    key = HEAD if form == "head alone" else TABLE
    assert not torch.equal(before[key], after[key]), "nothing was trained"


def test_a_missing_head_is_missing_where_nothing_ties_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "table alone")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(trimoe.UserError, match=f"lacks '{HEAD}'"):
        Skeleton.of(str(folder))
    tensors = load_file(folder / "model.safetensors")
    del tensors[TABLE]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(trimoe.UserError, match="lacks"):
        Skeleton.of(str(folder))


SWITCHES = {"output_router_logits": True, "output_hidden_states": True, "output_attentions": True, "return_dict": False, "use_cache": False}


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_what_trainers_leave_switched_on_is_off_on_the_way(
    family: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    plain = family_folder(family)
    folder = shutil.copytree(plain, tmp_path / "model")
    config = json.loads((plain / "config.json").read_text()) | SWITCHES
    (folder / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(walked(folder), walked(plain), atol=0, rtol=0)
    if family not in ("mixtral", "granitemoe"):
        return
    out = trimoe.compress(folder, {"steps": STEPS["experts"]}, tmp_path / "out", calibration=[str(text_file)], samples=2, length=32).out
    report = trimoe.evaluate(out, text=[str(text_file)], length=32, tokens=64, generate=True)
    assert report["texts"][0]["perplexity"] > 1 and "generation" in report
    written = json.loads((out / "config.json").read_text())
    assert {name: written[name] for name in SWITCHES} == SWITCHES
