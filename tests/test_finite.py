"""Activations beyond a dtype's range: one sentence that names the layer, the dtype and what to give instead, in every walk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from refusals import BASE, Line, recipe_file

import trimoe
from trimoe.calibration.observer import run_expert
from trimoe.evaluate import texts
from trimoe.methods.expert_drop.receptive_field import _distance
from trimoe.model.skeleton import Skeleton
from trimoe.team import ALONE
from trimoe.walk.finite import Inside, NotFinite, Range, checked
from trimoe.walk.walk import LayerWalk

STEPS: dict[str, list[dict[str, Any]]] = {
    "statistics": [{"expert_drop": {"count": 2, "counts": "uniform", "score": "gate"}}],
    "rerank": [{"layer_drop": {"count": 1, "rerank": "kl"}}],
    "blocks": [{"block_drop": {"count": 1}}],
    "gptq": [{"quantize": {"method": "gptq", "scope": "all-linear"}}],
    "awq": [{"quantize": {"method": "awq"}}],
    "factors": [{"low_rank": {"ratio": 0.3}}],
    "importance": [{"low_rank": {"ratio": 0.3, "rank": "optimal"}}],
    "wanda": [{"weight_prune": {"ratio": 0.5, "score": "wanda"}}],
    "sparsegpt": [{"weight_prune": {"ratio": 0.5, "score": "sparsegpt", "scope": "all-linear"}}],
}


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model in float16 whose layer 1 leaves float16's range: in what its experts give, in its attention, in one expert that hardly
    any token chooses; or whose logits do."""
    made: dict[str, Path] = {}

    def get(where: str) -> Path:
        if where not in made:
            model = families.build("mixtral")
            layer: Any = model.model.layers[1]
            with torch.no_grad():
                if where == "experts":
                    layer.mlp.experts.gate_up_proj *= 3000
                elif where == "attention":
                    layer.self_attn.o_proj.weight *= 1e4
                    layer.self_attn.v_proj.weight *= 1e3
                elif where == "unrouted":
                    layer.mlp.experts.gate_up_proj[5] *= 3000
                    model.model.embed_tokens.weight[:, 0] = 20  # in every token, and what expert 5 is not chosen by
                    layer.mlp.gate.weight[5] = 0
                    layer.mlp.gate.weight[5, 0] = -50
                else:
                    model.lm_head.weight *= 6e4
            made[where] = tmp_path_factory.mktemp(where)
            model.half().save_pretrained(made[where])
            families.tokenizer().save_pretrained(made[where])
        return made[where]

    return get


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("where", ["experts", "attention"])
def test_every_recipe_says_which_layer(
    where: str, steps: str, loud: Callable[[str], Path], text_file: Path, tmp_path: Path, line: Line
) -> None:
    recipe, out = recipe_file(tmp_path, {"steps": STEPS[steps]}), tmp_path / "out"
    command = ["compress", loud(where), "--recipe", recipe, "--out", out, "--calibration", text_file, *BASE]
    code, _, err = line.run(*command, "--dtype", "float16")
    (said,) = err.splitlines()
    assert code == 2 and "layer 1" in said and "in float16; give --dtype bfloat16 or float32" in said
    assert not out.exists()


def test_another_dtype_may_be_given_in_the_same_folder(loud: Callable[[str], Path], text_file: Path, tmp_path: Path, line: Line) -> None:
    recipe, out = recipe_file(tmp_path, {"steps": STEPS["statistics"]}), tmp_path / "out"
    command = ["compress", loud("experts"), "--recipe", recipe, "--out", out, "--calibration", text_file, *BASE]
    assert line.run(*command, "--dtype", "float16")[0] == 2
    assert line.run(*command, "--dtype", "bfloat16")[0] == 0
    assert json.loads((out / "trimoe.json").read_text())["inputs"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("where", "what"), [("experts", "hidden states after layer 1"), ("head", "the logits")])
def test_evaluation_says_so(where: str, what: str, loud: Callable[[str], Path], text_file: Path, line: Line) -> None:
    message = f"{what} hold NaN or infinite numbers in float16; give --dtype bfloat16 or float32"
    line.refused(
        message, "eval", loud(where), "--text", text_file, "--length", 32, "--tokens", 64, "--dtype", "float16", "--no-cache", "-q"
    )


def test_what_writes_and_what_is_timed_says_so(loud: Callable[[str], Path]) -> None:
    message = "the logits hold NaN or infinite numbers in float16"
    guarded = trimoe.load(loud("experts"))
    Range("loud", torch.float16).guard(guarded)
    with pytest.raises(NotFinite, match=message):
        guarded.generate(torch.arange(3, 19).view(1, 16), do_sample=True, max_new_tokens=4)
    with pytest.raises(trimoe.UserError, match=message):
        trimoe.bench(loud("experts"), prompt=8, generate=2, rounds=1)


def test_an_expert_that_no_token_chose_is_seen_by_the_search(loud: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Its outputs count for search tokens alone: the hidden states stay finite, the Gram does not."""
    skeleton = Skeleton.of(str(loud("unrouted")), torch.float16)
    walk = LayerWalk(skeleton, [torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))])
    with walk.layer(0) as first:
        walk.advance(0, first)
    with walk.layer(1) as layer:
        experts = skeleton.sites[1].experts_of(layer)
        assert not run_expert(experts, 5, walk.hidden[0].flatten(0, 1))[1].isfinite().all()
    steps = {"steps": [{"expert_drop": {"count": 6, "counts": "uniform", "search": "greedy"}}]}  # all experts are within reach
    with pytest.raises(NotFinite, match="layer 1: its statistics"):
        trimoe.compress(loud("unrouted"), steps, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32, dtype="float16")


@pytest.mark.parametrize(("dtype", "advice"), [
    (torch.float16, "give --dtype bfloat16 or float32"), (torch.bfloat16, "give --dtype float32"), (torch.float32, "the widest dtype"),
])  # fmt: skip
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_is_found(dtype: torch.dtype, advice: str, bad: float) -> None:
    watched, numbers = Range("model", dtype), torch.zeros(3, 5, dtype=dtype)
    watched.see(numbers)
    watched.see(numbers[:0])
    watched.check("numbers")
    numbers[1, 2] = bad
    watched.see(numbers)
    watched.see(torch.zeros(2, dtype=dtype))
    with pytest.raises(NotFinite, match=f"model: numbers hold NaN or infinite numbers.*{advice}"):
        watched.check("numbers")
    watched.check("numbers seen since")
    with pytest.raises(Inside, match=advice):
        checked(numbers, "numbers", dtype)


def test_a_perplexity_beyond_float64_is_its_largest() -> None:
    assert texts.perplexity(2.0) == pytest.approx(torch.tensor(2.0).exp().item())
    assert json.loads(json.dumps(texts.perplexity(1e6))) > 1e300


def test_a_dtype_is_given_by_name_or_as_torch_has_it(family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    folder, steps = family_folder("mixtral"), {"steps": STEPS["statistics"]}
    options: dict[str, Any] = {"calibration": [str(text_file)], "samples": 4, "length": 32}
    made = [
        trimoe.compress(folder, steps, tmp_path / str(number), dtype=dtype, device=device, **options).out
        for number, (dtype, device) in enumerate([("bfloat16", "cpu"), (torch.bfloat16, torch.device("cpu"))])
    ]
    records = [json.loads((out / "trimoe.json").read_text()) for out in made]
    assert records[0]["inputs"] == records[1]["inputs"] and records[0]["command"] == records[1]["command"]
    rows = [
        trimoe.evaluate(folder, text=[str(text_file)], length=32, tokens=64, dtype=dtype)["texts"] for dtype in ("bfloat16", torch.bfloat16)
    ]
    assert rows[0] == rows[1]
    for dtype in ("float16", torch.float16):
        assert trimoe.load(folder, dtype=dtype).dtype == torch.float16
        stats = trimoe.gather_statistics(folder, tmp_path / f"{dtype}.stats", dtype=dtype, **options)
        assert stats.about["dtype"] == "float16"
    for call in (
        lambda: trimoe.load(folder, dtype="half"), lambda: trimoe.evaluate(folder, dtype=torch.int8), lambda: trimoe.bench(folder, dtype="int8"),
        lambda: trimoe.compress(folder, steps, tmp_path / "never", dtype="float8", **options),
    ):  # fmt: skip
        with pytest.raises(trimoe.UserError, match=r"^dtype '.*' is not one of"):
            call()


def test_a_norm_in_half_precision_is_summed_in_more() -> None:
    """Hidden states that float16 holds have norms that it does not."""
    big = torch.full((1, 4, 64), 3e4, dtype=torch.float16)
    assert _distance([-big], [big], ALONE) == pytest.approx(2.0)
