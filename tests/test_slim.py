"""Quantised folders, end to end: the right integers under the right names, loadable elsewhere, resumed to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from forks import Forks
from runs import IDS, check_resumes, streamed

import trimoe
from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.methods.quantize.rounding import rounded
from trimoe.model.skeleton import Skeleton
from trimoe.walk.walk import LayerWalk

STACKED = {"gpt_oss", "granitemoe"}  # families that keep their experts in one tensor on disk
ALL = sorted(set(families.FAMILIES) - STACKED)
SPREAD = ["mixtral", "qwen2_moe", "deepseek_v3", "jamba", "ernie4_5_moe"]
SLIM = {"quantize": {"bits": 4, "method": "round"}}
RECIPES: dict[str, list[dict[str, Any]]] = {
    "alone": [SLIM],
    "after dropping": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "frequency"}}, SLIM],
    "uneven": [{"expert_drop": {"ratio": 0.4, "counts": "importance"}}, SLIM],
    "gptq": [{"quantize": {"bits": 4, "method": "gptq"}}],
    "awq": [{"quantize": {"bits": 8, "method": "awq"}}],
    "merged": [{"low_rank": {"ratio": 0.3, "rank": "uniform", "form": "dense"}}, {"quantize": {"bits": 8, "method": "gptq"}}],
    "block": [{"block_drop": {"count": 1}}, SLIM],
    "layer": [{"layer_drop": {"count": 1}}, SLIM],
    "all": [{"quantize": {"bits": 4, "method": "gptq", "scope": "all-linear"}}],
    "all, layer": [{"layer_drop": {"count": 1}}, {"quantize": {"bits": 8, "method": "awq", "scope": "all-linear"}}],
}

IN_NEW_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    if sys.argv[1] == "trimoe": import trimoe
    options = {"trust_remote_code": True} if sys.argv[1] == "remote" else {}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        logits = model.eval()(ids).logits
        model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    torch.save({"logits": logits, "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}, folder + ".seen")
"""


def compress(source: Path, text: Path, out: Path, recipe: str) -> trimoe.Result:
    return trimoe.compress(source, {"steps": RECIPES[recipe]}, out, calibration=[str(text)], samples=4, length=32)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("recipe", ["alone", "after dropping"])
def test_every_matrix_is_its_source_rounded(
    family: str, recipe: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Against transformers' own view of the source: stack, drop and round there, then compare what a reload of the output holds."""
    out = tmp_path / "out"
    result = compress(family_folder(family), text_file, out, recipe)
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert result.metrics["quantize"]["quantized_share"] == 1.0
    before = trimoe.plan(str(family_folder(family)), {"steps": RECIPES[recipe]})
    assert before.bytes == result.plan.bytes
    assert before.after.parameters == result.plan.after.parameters < before.before.parameters or recipe == "alone"
    whole, skeleton, small = families.build(family), Skeleton.of(str(family_folder(family))), Skeleton.of(str(out))
    walk, layers = LayerWalk(small, []), whole.get_submodule(skeleton.prefix)
    for index, decision in result.decisions.items():
        site = skeleton.sites[index]
        experts = site.experts_of(layers[index])
        with walk.layer(index) as layer:
            got = site.experts_of(layer)
            for name in ("gate_up_proj", "down_proj"):
                source, found = getattr(experts, name).data, getattr(got, name)
                assert len(found) == len(decision.keep)
                for place, expert in enumerate(decision.keep):
                    assert torch.equal(found[place], rounded(source[expert], 4, decision.group or 0, torch.float32).dense()), (index, name)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [(SPREAD[(number + more) % len(SPREAD)], recipe) for number, recipe in enumerate(RECIPES) for more in (0, 2)],  # each recipe on two
)
def test_plan_loading_and_streaming_agree(
    family: str, recipe: str, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = compress(family_folder(family), text_file, out, recipe)
    assert result.plan.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert Checkpoint.open(out).scheme == (RECIPES[recipe][-1]["quantize"]["bits"], 8)
    model = trimoe.load(out, backend="dequantize")
    assert model.trimoe_quantized_share == 1.0  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, streamed(out), atol=1e-4, rtol=1e-4)
    kl = trimoe.evaluate(out, against=str(family_folder(family)), text=[str(text_file)], length=32, tokens=200)["mean_kl"]
    assert kl < 1 if recipe in ("alone", "gptq", "awq") else kl > 0


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "how", "named"), [
    ("gptq", "stock", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe"]), ("uneven", "trimoe", ["mixtral", "qwen2_moe"]),
    ("uneven", "remote", ["mixtral", "qwen3_moe"]), ("layer", "stock", ["qwen2_moe", "qwen3_moe"]), ("layer", "trimoe", ["mixtral"]),
    ("block", "stock", ["mixtral", "deepseek_v3"]), ("all", "stock", ["mixtral", "qwen2_moe", "deepseek_v3"]),
    ("all, layer", "stock", ["qwen2_moe"]),
])  # fmt: skip
def test_loads_in_a_new_process(
    recipe: str,
    how: str,
    named: list[str],
    family_folder: Callable[[str], Path],
    text_file: Path,
    with_trimoe: Forks,
    with_transformers: Forks,
    tmp_path: Path,
) -> None:
    """With compressed-tensors installed, transformers opens the folder and computes what the packed integers say."""
    pytest.importorskip("compressed_tensors")
    folders = {family: tmp_path / family for family in named}
    for family, folder in folders.items():
        compress(family_folder(family), text_file, folder, recipe)
    forks = with_trimoe if how == "trimoe" else with_transformers
    process = forks.run("-c", IN_NEW_PROCESS, how, *folders.values())
    assert process.returncode == 0, process.stderr[-3000:]
    for family, folder in folders.items():
        seen = torch.load(f"{folder}.seen")
        assert seen["missing"] == seen["unexpected"] == [], family
        torch.testing.assert_close(seen["logits"], streamed(folder), atol=1e-4, rtol=1e-4, msg=family)


@pytest.mark.parametrize("recipe", ["gptq", "merged"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_resumed_run_writes_the_same_bytes(
    recipe: str, after: int, family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """Killed between shards of one layer each: the quantised layers that are there are read back, not done again."""
    check_resumes(lambda out: compress(family_folder("qwen2_moe"), text_file, out, recipe), tmp_path, after)


@pytest.mark.parametrize(("family", "steps", "message"), [
    ("gpt_oss", [SLIM], "stacked in one tensor"),
    ("mixtral", [SLIM, SLIM], "quantize follows it"),
    ("mixtral", [{"low_rank": {"ratio": 0.3}}, SLIM], "use low_rank with form: dense"),
    ("mixtral", [SLIM, {"expert_drop": {"ratio": 0.25}}], "quantize is fitted to the finished model"),
    ("mixtral", [SLIM, {"low_rank": {"ratio": 0.3}}], "quantize is fitted to the finished model"),
    ("mixtral", [SLIM, {"layer_drop": {"count": 1}}], "quantize is fitted to the finished model"),
])  # fmt: skip
def test_what_cannot_be_is_said_at_plan_time(
    family: str, steps: list[dict[str, Any]], message: str, family_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError, match=message):
        trimoe.plan(str(family_folder(family)), {"steps": steps})


def test_a_quantised_folder_is_not_compressed_again(family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    compress(family_folder("mixtral"), text_file, tmp_path / "out", "alone")
    with pytest.raises(UserError, match="already quantised"):
        trimoe.plan(str(tmp_path / "out"), "expert-drop")
