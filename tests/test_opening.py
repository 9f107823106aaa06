"""What is left out of a checkpoint, what is carried over, and families whose router is called in a way of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from damage import says
from safetensors.torch import load_file, save_file

import trimoe
from trimoe.auto_classes import FAMILIES
from trimoe.model import depth_config, transformers5
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.plan import inspection, token_cost
from trimoe.walk.decided import masked

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


def test_the_order_of_keys_in_the_header_changes_nothing(family_folder: Family, tmp_path: Path) -> None:
    """Matrix by matrix instead of expert by expert: what Mixtral's w1, w2 and w3 are is found all the same."""
    shutil.copytree(family_folder("mixtral"), tmp_path / "other")
    state = {key: tensor for path in (tmp_path / "other").glob("*.safetensors") for key, tensor in load_file(path).items()}
    with_tensors(tmp_path / "other", {})
    file = tmp_path / "other" / "model.safetensors"
    names = sorted(state, key=lambda key: (key.split(".")[-2:], [int(part) if part.isdigit() else 0 for part in key.split(".")]))
    place, head = 0, {}
    for key in names:
        head[key] = {"dtype": "F32", "shape": list(state[key].shape), "data_offsets": [place, place + state[key].nbytes]}
        place += state[key].nbytes
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(state[key].contiguous().numpy().tobytes() for key in names))
    one, other = (Skeleton.of(str(folder)) for folder in (family_folder("mixtral"), tmp_path / "other"))
    assert {name: sorted(keys) for name, keys in one.conversion.source_of.items()} == {
        name: sorted(keys) for name, keys in other.conversion.source_of.items()
    }
    assert one.conversion.stacked == other.conversion.stacked


def test_no_spelling_counts_prediction_layers() -> None:
    config = {"num_nextn_predict_layers": 1, "text_config": {"mtp_num_hidden_layers": 2, "use_mtp": True, "mtp_loss": 0.1}, "layers": 3}
    made = transformers5.without_prediction(config)
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
    ids, stock, skeleton = torch.arange(3, 19)[None], families.build(family), Skeleton.of(str(tmp_path / "source"))
    layers = stock.get_submodule(skeleton.prefix)
    with torch.no_grad(), ExitStack() as stack:
        for index, decision in result.decisions.items():
            gone = tuple(sorted(set(range(8)) - set(decision.keep)))
            stack.enter_context(masked(layers[index], skeleton.sites[index], gone))
        torch.testing.assert_close(trimoe.load(result.out)(ids).logits, stock(ids).logits, atol=1e-4, rtol=0)


def test_nothing_large_is_allocated(family_folder: Family) -> None:
    """Stacked experts of terabytes, more than any machine has, are built on meta; buffers are those of a real build."""
    config = families.config_of("mixtral")
    real = transformers5._built(config, torch.float32)
    built = transformers5.build_meta(config, torch.float32)
    assert all(torch.equal(buffer, dict(real.named_buffers())[name]) for name, buffer in built.named_buffers())
    config.num_local_experts, config.intermediate_size = 4096, 1 << 24
    huge = transformers5.build_meta(config, torch.float32)
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


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_alike_layers_are_as_each_by_itself(family: str, family_folder: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and experts' keys are worked out for one layer of a kind: they are what every layer gives when it is asked."""
    skeleton, other = (Skeleton.of(family_folder(family)) for _ in range(2))
    layout = Layout(skeleton, unchanged(skeleton.sites))
    for index, site in skeleton.sites.items():
        for path in site.expert_axes:
            assert layout.disk_expert(index, site, path) == layout._disk_expert(index, site, path)
    found = token_cost.caches(skeleton)
    monkeypatch.setattr(depth_config, "unlike", lambda *layers: "each is of its own kind")
    assert found is not None and found == token_cost.caches(other)


GROUPED, MLA = families.GROUPED, families.MLA
ONE_GROUP = dict(n_shared_experts=1, n_group=1, topk_group=1)
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
INDEXED = {**GROUPED, **MLA, **ONE_GROUP, **SPARSE, "q_lora_rank": 16, "first_k_dense_replace": 1, "index_head_dim": 8, "index_n_heads": 2,
           "index_topk": 8}  # fmt: skip
LOCAL = dict(num_local_experts=8, num_experts_per_tok=2, intermediate_size=24)
MIXED = ["sliding_attention", "full_attention", "full_attention"]
LISTED: dict[str, dict[str, Any]] = {
    **families.FAMILIES, **BIASED,
    "axk1": INDEXED, "deepseek_v32": INDEXED, "glm_moe_dsa": {**INDEXED, "indexer_types": ["full", "full", "shared"]},
    "bailing_hybrid": {**MLA, **QWEN, "num_experts_per_token": 2, "num_shared_experts": 1, "q_lora_rank": 16, "head_dim": 8, "n_group": 1,
                       "topk_group": 1, "first_k_dense_replace": 1},
    "cohere2_moe": {**QWEN, **SPARSE, "head_dim": 8, "layer_types": MIXED},
    "dots1": {**GROUPED, **ONE_GROUP, "first_k_dense_replace": 1, "head_dim": 8},
    "exaone_moe": {**QWEN, **SPARSE, "head_dim": 8, "n_group": 1, "topk_group": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
                   "layer_types": MIXED},
    "flex_olmo": dict(num_experts=8, num_experts_per_tok=2, intermediate_size=24, num_key_value_heads=4),
    "glm4_moe_lite": {**GROUPED, **MLA, **ONE_GROUP, **SPARSE, "q_lora_rank": 16},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 24},
    "granitemoehybrid": {**LOCAL, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
                         "layers_block_type": ["mamba", "attention", "mamba"], "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "hy_v3": {**QWEN, **SPARSE, "head_dim": 8},
    "laguna": {**QWEN, **SPARSE, "head_dim": 8, "shared_expert_intermediate_size": 24},
    "mellum": dict(num_local_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8),
    "mimo_v2_flash": {**GROUPED, **SPARSE, "head_dim": 8, "v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8, "n_group": 1,
                      "topk_group": 1, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "minimax_m2": {**LOCAL, "head_dim": 8},
    "nemotron_h": dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=40, n_groups=2, n_group=1,
                       moe_shared_expert_intermediate_size=24, hybrid_override_pattern="ME*E", num_hidden_layers=4, head_dim=8,
                       mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, topk_group=1),
    "qwen3_5_moe_text": {**families.FAMILIES["qwen3_next"], "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}},
    "solar_open": {**GROUPED, **ONE_GROUP, "head_dim": 8},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_listed_family_is_supported(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what is built on meta has the buffers that a real build has."""
    monkeypatch.setitem(families.FAMILIES, family, LISTED[family])
    families.save(family, tmp_path)
    skeleton = Skeleton.of(tmp_path)
    assert skeleton.sites and all(site.rule.top_k == 2 for site in skeleton.sites.values())
    config = families.config_of(family)
    real, built = (dict(make(config, torch.float32).named_buffers()) for make in (transformers5._built, transformers5.build_meta))
    assert real.keys() == built.keys() and all(torch.equal(built[name], buffer) for name, buffer in real.items())
