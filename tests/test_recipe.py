"""Recipes: what is written is what is meant, and what is wrong is said."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimoe.errors import UserError
from trimoe.methods import ExpertDrop, LowRank
from trimoe.methods.expert_drop.options import Exhaustive, Genetic, Greedy, Random, ReceptiveField
from trimoe.recipe import recipe
from trimoe.recipe.recipe import Recipe, load, recovery, text_of
from trimoe.text.spec import CalibrationSpec

DROP: dict[str, Any] = {"steps": [{"expert_drop": {"ratio": 0.25}}]}


def drop_step(parsed: Recipe, number: int = 0) -> ExpertDrop:
    step = parsed.steps[number]
    assert isinstance(step, ExpertDrop)
    return step


@pytest.mark.parametrize("name", recipe.names())
def test_built_in_recipes_load_and_round_trip(name: str, tmp_path: Path) -> None:
    parsed = load(name)
    assert load(parsed.to_json()) == parsed
    assert load(parsed) is parsed
    path = tmp_path / "mine.yaml"
    path.write_text(recipe.text_of(name), encoding="utf-8")
    assert load(path) == load(str(path)) == parsed
    path.write_text(yaml.safe_dump(parsed.to_json()), encoding="utf-8")
    assert load(path) == parsed
    assert recipe.text_of(name).startswith("# "), "the first line says what it is"


def test_built_in_recipes_say_what_they_are_named_for() -> None:
    assert recipe.names() == [
        "block-drop", "block-drop-int4", "expert-drop", "expert-drop-int4", "holistic-paper", "layer-drop", "layer-drop-full", "layer-drop-int4", "low-rank",
        "moe-i2", "moe-i2-full", "moe-i2-paper", "moe-i2-prune-only", "moe-pruner", "moe-pruner-2-4", "moe-pruner-full",
        "moe-pruner-paper", "naee", "slim-int4", "slim-int8", "sparsegpt", "wanda",
    ]  # fmt: skip
    both = load("moe-i2").steps
    assert [type(step) for step in both] == [ExpertDrop, LowRank]
    assert both[0] == load("moe-i2-prune-only").steps[0]
    assert load("moe-i2-full").steps == both
    assert drop_step(load("moe-i2")).search == Genetic(population=100, generations=50)
    assert drop_step(load("moe-i2")).receptive_field == ReceptiveField(k=3, t=3)
    assert (drop_step(load("naee")).search, drop_step(load("naee")).counts, load("naee").target) == (Exhaustive(), "uniform", "any")
    left = (1 - both[0].ratio) * (1 - both[1].ratio)  # type: ignore[operator]
    assert left == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (None, None), ("none", None), ("greedy", Greedy()), ("exhaustive", Exhaustive()), ("genetic", Genetic()), ("random", Random()),
        ({"genetic": {"population": 8}}, Genetic(population=8)), ({"greedy": {}}, Greedy()), ({"greedy": None}, Greedy()),
        ({"random": {"draws": 5}}, Random(draws=5)), ({"exhaustive": {"limit": 3}}, Exhaustive(limit=3)),
    ],
)  # fmt: skip
def test_searches_by_name_alone_or_with_fields(given: Any, meant: Any) -> None:
    parsed = load({"steps": [{"expert_drop": {"ratio": 0.25, "search": given}}]})
    assert drop_step(parsed).search == meant
    assert load(parsed.to_json()) == parsed


def test_a_step_without_fields_and_defaults() -> None:
    assert load({"steps": ["expert_drop"]}) == load({"steps": [{"expert_drop": None}]}) == load({"steps": [{"expert_drop": {}}]})
    parsed = load(DROP)
    assert parsed.calibration == CalibrationSpec(data="builtin:mixed", samples=128, length=2048)
    assert parsed.calibration.sources == ["builtin:mixed"]
    assert load({**DROP, "calibration": {"data": ["a.txt", "b=c.txt"]}}).calibration.sources == ["a.txt", "b=c.txt"]
    assert (parsed.target, drop_step(parsed).counts, drop_step(parsed).search) == ("transformers", "importance", None)


def test_set_reaches_every_field() -> None:
    parsed = load(
        "moe-i2",
        [
            "steps.0.ratio=0.5", "steps.0.expert_drop.counts=uniform", "steps.0.search.genetic.population=12", "steps.0.receptive_field.k=2",
            "steps.1.rank=importance", "steps.1.low_rank.alpha=1", "calibration.samples=4", "calibration.data=[x.txt, y.txt]", "target=transformers",
        ],
    )  # fmt: skip
    drop, low = drop_step(parsed), parsed.steps[1]
    assert (drop.ratio, drop.counts, drop.search, drop.receptive_field) == (
        0.5, "uniform", Genetic(population=12, generations=50), ReceptiveField(k=2, t=3),
    )  # fmt: skip
    assert isinstance(low, LowRank)
    assert (low.rank, low.alpha, low.ratio, low.whiten) == ("importance", 1.0, 0.333, "input")
    assert (parsed.calibration.samples, parsed.calibration.sources) == (4, ["x.txt", "y.txt"])
    assert load("moe-i2") == load("moe-i2", []), "overrides never touch the recipe they start from"


def test_set_changes_choices_and_removes_them() -> None:
    assert drop_step(load("moe-i2", ["steps.0.search=greedy"])).search == Greedy()
    assert drop_step(load("naee", ["steps.0.search.exhaustive.limit=7"])).search == Exhaustive(limit=7), "a choice by name gets fields"
    assert drop_step(load("moe-i2", ["steps.0.search=none", "steps.0.receptive_field=null"])).search is None
    assert drop_step(load("moe-i2", ["steps.0.receptive_field=null"])).receptive_field is None
    assert drop_step(load(DROP, ["steps.0.receptive_field.t=2"])).receptive_field == ReceptiveField(t=2)
    assert load(DROP, ["calibration.length=64"]).calibration.length == 64
    assert load("moe-i2", ["steps.1={low_rank: {ratio: 0.5}}"]).steps[1] == LowRank(ratio=0.5)
    assert drop_step(load({"steps": [{"expert_drop": None}]}, ["steps.0.count=2"])).count == 2
    again = load(load("moe-i2"), ["steps.0.ratio=0.125"])
    assert (drop_step(again).ratio, again.steps[1]) == (0.125, load("moe-i2").steps[1])
    assert DROP == {"steps": [{"expert_drop": {"ratio": 0.25}}]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "steps must be a list of at least one of: expert_drop, layer_drop, block_drop, low_rank, weight_prune, quantize."),
        ({"steps": []}, "steps must be a list"),
        ({"steps": "expert_drop"}, "steps must be a list"),
        (
            {"steps": [{"expertdrop": {}}]},
            "steps.0 is 'expertdrop'; a step is one of: expert_drop, layer_drop, block_drop, low_rank, weight_prune, quantize.",
        ),
        ({"steps": [{}]}, "steps.0 is 'nothing'"),
        ({"steps": [{"expert_drop": {}, "low_rank": {}}]}, "steps.0 has 2 keys (expert_drop, low_rank); a step has one"),
        ({"steps": [{"expert_drop": 0.5}]}, "steps.0.expert_drop is 0.5; a mapping is expected."),
        (
            {"steps": [{"expert_drop": {"ratoi": 0.5}}]},
            "steps.0.expert_drop has no field 'ratoi' (did you mean ratio?); known: ratio, count,",
        ),
        ({"steps": [{"expert_drop": {"ratio": 1.0}}]}, "ratio is 1.0; input should be less than 1."),
        ({"steps": [{"expert_drop": {"ratio": -0.1}}]}, "greater than or equal to 0."),
        ({"steps": [{"expert_drop": {"ratio": "half"}}]}, "ratio is 'half'; input should be a valid number"),
        (
            {"steps": [{"expert_drop": {"counts": "evenly"}}]},
            "counts is 'evenly'; input should be 'importance', 'uniform', 'optimal' or 'global'.",
        ),
        (
            {"steps": [{"expert_drop": {"search": "brute"}}]},
            "'brute' is not a search; there are none, genetic, exhaustive, greedy, random.",
        ),
        ({"steps": [{"expert_drop": {"search": {"greedy": 3}}}]}, "the fields of greedy must be a mapping, not 3."),
        ({"steps": [{"low_rank": {}}]}, "steps.0.low_rank needs the field 'ratio'."),
        ({"steps": [{"low_rank": {"ratio": 0}}]}, "greater than 0."),
        (
            {**DROP, "calibration": {"sample": 3}},
            "calibration has no field 'sample' (did you mean samples?); known: data, samples, length,",
        ),
        ({**DROP, "calibration": {"samples": 0}}, "samples is 0; input should be greater than or equal to 1."),
        ({**DROP, "target": "onnx"}, "target is 'onnx'; input should be 'transformers', 'vllm', 'llama.cpp' or 'any'."),
        ({**DROP, "targets": "any"}, "has no field 'targets' (did you mean target?); known: steps, calibration, target, recover."),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("search", "field"), [({"genetic": {"populations": 5}}, "populations"), ({"genetic": {"population": 1}}, "population")]
)
def test_mistakes_inside_a_search_are_named(search: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"search.*{field}") as caught:
        load({"steps": [{"expert_drop": {"ratio": 0.2, "search": search}}]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("steps.0.ratio", "has no '='"),
        ("steps.7.ratio=0.5", "steps has 1 entry, numbered from 0; '7' is none of them."),
        ("steps.first.ratio=0.5", "'first' is none of them."),
        ("steps.0.ratio.deep=1", "is a plain value and has no field 'deep'."),
        ("steps.0.search.greedy.x.y=1", "search"),
        ("=3", "has no field"),
        ("steps.0.rank=optimal", "has no field 'rank'"),
        ("steps.0.ratio=[", "--set"),
        ("calibration=3", "is 3; a mapping is expected."),
        ("steps=3", "steps must be a list"),
    ],
)
def test_wrong_overrides_are_named(change: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load(DROP, [change])
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("steps: [", encoding="utf-8")
    with pytest.raises(UserError, match="is not valid YAML"):
        load(path)
    path.write_text("- expert_drop", encoding="utf-8")
    with pytest.raises(UserError, match="holds a list; a mapping with steps is expected"):
        load(path)
    for text, said in (
        ("", "is empty"),
        ("# steps\n", "is empty"),
        ("3", "holds 3 alone"),
        ("expert drop", "holds 'expert drop' alone"),
        ("x " * 99, "holds text alone"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"broken\.yaml {said}; a mapping with steps is expected\.$"):
            load(path)
    with pytest.raises(UserError, match=r"no built-in recipe 'moe-i3' \(did you mean moe-i2\?\).*there are: block-drop, "):
        load("moe-i3")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match=r"is 3; a built-in name, a YAML file or a mapping is expected"):
        load(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)


def test_a_recipe_may_come_through_a_pipe() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write(text_of("naee"))
    assert load(f"/dev/fd/{reading}") == load("naee")
    os.close(reading)


def test_an_option_and_a_change_of_one_field() -> None:
    assert recovery({"method": "lora"}, ["rate=1e-4"]).rate == 1e-4
    with pytest.raises(UserError, match="--set method=lora and the option for method say two things"):
        recovery({"method": "logits"}, ["method=lora"])


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00steps")
    with pytest.raises(UserError, match="UTF-8"):
        load(path)
