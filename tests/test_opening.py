"""What is left out of a checkpoint, what is carried over, and families whose router is called in a way of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from damage import says
from safetensors.torch import load_file, save_file

import trimoe
from trimoe import hf, inspection
from trimoe.skeleton import Skeleton

Family = Callable[[str], Path]
UNIFORM = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "gate"}}]}
QWEN = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=40)
BIASED = {
    "lfm2_moe": {**QWEN, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "afmoe": {**QWEN, "num_dense_layers": 1, "num_hidden_layers": 3, "head_dim": 8, "layer_types": ["full_attention"] * 3},
}


def with_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The checkpoint with more tensors, in one file."""
    old = sorted(folder.glob("*.safetensors"))
    state = {key: tensor for path in old for key, tensor in load_file(path).items()}
    for path in [*old, folder / "model.safetensors.index.json"]:
        path.unlink()
    save_file({**state, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("mtp.layers.0.mlp.gate.weight", "multi-token prediction"), ("model.mtp.fc.weight", "multi-token prediction"),
        ("model.mtp_layers.0.x.weight", "multi-token prediction"), ("model.layers.3.eh_proj.weight", "multi-token prediction"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "buffers"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(key: str, kind: str, source: Path) -> None:
    with_tensors(source, {key: torch.zeros(4)})
    (said,) = trimoe.inspect(str(source))["left_out"]
    assert said.startswith("left out: 1 ") and kind in said and key in said


def test_no_spelling_counts_prediction_layers() -> None:
    config = {"num_nextn_predict_layers": 1, "text_config": {"mtp_num_hidden_layers": 2, "use_mtp": True, "mtp_loss": 0.1}, "layers": 3}
    made = hf.without_prediction(config)
    assert made == {
        "num_nextn_predict_layers": 0,
        "text_config": {"mtp_num_hidden_layers": 0, "use_mtp": False, "mtp_loss": 0.1},
        "layers": 3,
    }


@pytest.mark.parametrize(("layers", "said"), [(2, "but there are tensors of layer 2"), (4, "but there are no tensors of layer 3")])
def test_depth_that_disagrees_is_one_sentence(layers: int, said: str, source: Path) -> None:
    says(num_hidden_layers=layers)(source)
    about = trimoe.inspect(str(source))
    assert not about["supported"] and f"num_hidden_layers = {layers}, {said}" in about["reason"]


def test_everything_beside_the_weights_is_carried_over(source: Path, text_file: Path, tmp_path: Path) -> None:
    kept = ("additional_chat_templates/tool.jinja", "LICENCE", "vocab.bpe", "tokenizer.model.v3", "1_Pooling/config.json")
    lost = (
        "original/params.json",
        "original/consolidated.00.pth",
        "optimizer.pt",
        "pytorch_model.bin",
        "model.fp16.safetensors.index.json",
        ".git/x",
    )
    for name in (*kept, *lost):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    plan = trimoe.compress(str(source), UNIFORM, tmp_path / "out", calibration=[str(text_file)], samples=2, length=32).plan
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in kept)
    assert not any((tmp_path / "out" / name).exists() for name in lost)
    assert any("optimizer.pt, original/, pytorch_model.bin" in line for line in plan.warnings)


@pytest.mark.parametrize("family", BIASED)
def test_biases_that_the_block_keeps(family: str, monkeypatch: pytest.MonkeyPatch, text_file: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(families.FAMILIES, family, BIASED[family])
    families.save(family, tmp_path / "source")
    result = trimoe.compress(str(tmp_path / "source"), UNIFORM, tmp_path / "out", calibration=[str(text_file)], samples=2, length=32)
    assert {len(decision.keep) for decision in result.decisions.values()} == {6}
    with torch.no_grad():
        assert bool(trimoe.load(result.out)(torch.arange(3, 19)[None]).logits.isfinite().all())


def test_nothing_large_is_allocated(family_folder: Family) -> None:
    """Stacked experts of terabytes, more than any machine has, are built on meta; buffers are those of a real build."""
    config = families.config_of("mixtral")
    real = hf._built(config, torch.float32)
    built = hf.build_meta(config, torch.float32)
    assert all(torch.equal(buffer, dict(real.named_buffers())[name]) for name, buffer in built.named_buffers())
    config.num_local_experts, config.intermediate_size = 4096, 1 << 24
    huge = hf.build_meta(config, torch.float32)
    assert all(parameter.is_meta for parameter in huge.parameters()) and not any(buffer.is_meta for buffer in huge.buffers())


def test_parts_of_a_packed_checkpoint_are_stored_bytes(text_file: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {"steps": [{"quantize": {"bits": 4, "method": "round"}}]}
    trimoe.compress("builtin:mini-mixtral", recipe, tmp_path / "out", calibration=[str(text_file)], samples=2, length=32)
    about = inspection.inspect(str(tmp_path / "out"))
    assert sum(about["bytes"].values()) == about["tensor_bytes"] == Skeleton.of(tmp_path / "out").checkpoint.nbytes
    assert "compressed-tensors" in about["loads_in"]["transformers"]


def test_an_output_that_is_a_link_to_nothing(source: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(trimoe.errors.UserError, match=r"is a link to .*nowhere, which does not exist"):
        trimoe.compress(str(source), UNIFORM, out, calibration=[str(text_file)], samples=2, length=32)
    assert json.loads((source / "config.json").read_text())
