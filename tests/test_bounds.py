"""Plans against what is made: exact where a recipe fixes the result, bounds where decisions are open; and how the tables fit."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import one_worker, small

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.plan.passes import passes
from trimoe.recipe import recipe
from trimoe.show import plan, table

Family = Callable[[str], Path]
DROP = {"expert_drop": {"count": 2, "counts": "uniform", "search": "greedy"}}
MANY = {"calibration": {"samples": 4096, "length": 64}}
STEPS: dict[str, list[dict[str, Any]]] = {
    "threshold": [{"block_drop": {"threshold": 0.5}}],
    "mixed": [{"layer_drop": {"count": 3, "blocks": True}}],
    "uniform": [{"expert_drop": {"count": 2, "counts": "uniform", "search": "greedy"}}, {"low_rank": {"ratio": 0.3, "rank": "uniform"}}],
    "importance": [{"expert_drop": {"ratio": 0.3, "counts": "importance", "search": "greedy"}}, {"low_rank": {"ratio": 0.3, "rank": "importance"}}],
    "optimal": [{"expert_drop": {"ratio": 0.3, "counts": "optimal", "search": "greedy"}}, {"low_rank": {"ratio": 0.3, "rank": "optimal"}}],
    "shorter": [{"block_drop": {"count": 1}}, {"low_rank": {"ratio": 0.3, "rank": "optimal"}}],
    "emptier": [{"expert_drop": {"ratio": 0.3, "counts": "importance", "search": "greedy"}}, {"layer_drop": {"count": 1}}],
}  # fmt: skip


@pytest.mark.parametrize("name", one_worker(recipe.names()))
def test_bounds_of_recipes_come_true(name: str, eight_layers: Path, compressed_by: Callable[[str], trimoe.Result]) -> None:
    result = compressed_by(name)
    come_true(name, trimoe.plan(eight_layers, name, **small(name)), result.plan, result.out)


@pytest.mark.parametrize("name", STEPS)
def test_bounds_of_mixtures_come_true(name: str, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    """With much left open."""
    folder, steps, options = family_folder("mixtral"), {"steps": STEPS[name]}, {"calibration": [str(text_file)], "samples": 4, "length": 32}
    before = trimoe.plan(folder, steps, **options)
    come_true(name, before, trimoe.compress(folder, steps, tmp_path / "out", **options).plan, tmp_path / "out")


def come_true(name: str, before: trimoe.Plan, made: trimoe.Plan, folder: Path) -> None:
    """What was made lies within the plan's bounds, and is the plan where that is exact."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert before.after.least_bytes <= size == made.after.file_bytes <= before.after.file_bytes
    assert made.after.parameters <= before.after.parameters and made.after.experts <= before.after.experts
    assert all(low <= made.depth[kind][1] == made.depth[kind][2] <= high for kind, (_, low, high) in before.depth.items())
    if before.after.exact:
        assert (made.after.parameters, made.after.experts) == (before.after.parameters, before.after.experts)
    finals = {row["layer"]: row for row in made.layers}
    for planned in before.layers:
        real = finals[planned["layer"]]
        assert planned["kept"] in (None, real["kept"]) and (planned["rank"] in ("?", real["rank"]) or real["gone"])
    if name in ("uniform", "naee", "block-drop", "expert-drop"):
        assert before.bytes == size and all(row["rank"] != "?" for row in before.layers), (before.bytes, size)


def test_how_many_layers_stay_is_in_the_table(family_folder: Family) -> None:
    shown = str(trimoe.plan(family_folder("mixtral"), {"steps": [{"block_drop": {"count": 1}}]}))
    assert "decoder layers" in shown and shown.count("2 of 3") == 2
    shown = str(trimoe.plan(family_folder("mixtral"), {"steps": [{"layer_drop": {"count": 1}}]}))
    assert "decoder layers" not in shown and shown.count("2 of 3") == 1
    shown = str(trimoe.plan(family_folder("mixtral"), {"steps": [{"block_drop": {"threshold": 0.9}}]}))
    assert shown.count("1 to 3 of 3") == 2
    assert " of 3" not in str(trimoe.plan(family_folder("mixtral"), {"steps": [DROP]}))


@pytest.mark.parametrize("name", ["moe-i2", "expert-drop-int4", "block-drop"])
def test_tables_are_whole_in_little_room(name: str) -> None:
    """No line is longer, and no word of a heading is broken."""
    body = trimoe.plan("builtin:mini-qwen2-moe", name).to_json()
    body["traffic"] = {"8": {"before": 123456.0, "after": 23456.0}}
    body["passes"] = passes(Skeleton.of("builtin:mini-qwen2-moe"), recipe.load(name), 1 << 20)
    for width in (60, 80):
        out = io.StringIO()
        table.console(out, width=width).print(plan.of_plan(body))
        lines = out.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        words = {word for line in lines for word in line.split()}
        headings = {"before", "after", "share", "layer", "experts", "form", "tensor", "bytes", "params", "loads", "passes"}
        headings |= {"read", "written", "expert", "parallel", "bytes/token", "saving", "equal"}
        assert headings <= words, headings - words
        assert ("cache/1K" in words) == (width == 80)


def test_memory_by_stage(family_folder: Family) -> None:
    folder = str(family_folder("mixtral"))
    made = trimoe.plan(folder, {"steps": [DROP, {"low_rank": {"ratio": 0.3, "rank": "optimal"}}]})
    assert set(made.memory_split) == {"statistics", "measuring", "writing"} and made.peak_memory == max(made.memory_split.values())
    assert "statistics: " in str(made)
    packed = trimoe.plan(folder, {"steps": [{"quantize": {"group": 8, "method": "round"}}]})
    assert set(packed.memory_split) == {"writing"} and packed.memory_split["writing"] > Skeleton.of(folder).largest_layer


def test_memory_of_a_recovery_is_the_models_that_train(family_folder: Family) -> None:
    folder = str(family_folder("mixtral"))
    drop = {"steps": [DROP]}
    bare = trimoe.plan(folder, drop)
    assert "recovery" not in bare.memory_split

    def held(**fields: Any) -> int:
        return trimoe.plan(folder, {**drop, "recover": fields}).memory_split["recovery"]

    full, adapters, router = held(method="logits", train="full"), held(method="lora", rank=1), held(method="router")
    assert full > adapters > router > 4 * bare.after.parameters
    assert held(method="experts", stream=False) > full > held(method="experts", samples=2, length=8)


def test_advice_names_every_reason_for_a_native_result(family_folder: Family) -> None:
    folder = str(family_folder("mixtral"))
    both = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}}, {"layer_drop": {"count": 1}}]}
    (said,) = [line for line in trimoe.plan(folder, both).warnings if "loads in transformers only" in line]
    assert "steps.0.counts=uniform" in said and "block_drop in the place of layer_drop" in said
