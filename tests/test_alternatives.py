"""What lists in a recipe mean: combinations, their names, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimoe.errors import UserError
from trimoe.recipe import recipe as recipes
from trimoe.sweep.grid import variants

DROP: dict[str, Any] = {"steps": [{"expert_drop": {"ratio": [0.25, 0.5], "score": ["gate", "reap"], "counts": "uniform"}}]}


def names(*given: Any, changes: list[str] = []) -> list[str]:
    return [variant.name for variant in variants(given, changes)]


def test_lists_mean_every_combination() -> None:
    assert names(DROP) == ["ratio-0.25_score-gate", "ratio-0.25_score-reap", "ratio-0.5_score-gate", "ratio-0.5_score-reap"]
    assert names("expert-drop", changes=["steps.0.ratio=[0.1, 0.2]"]) == ["ratio-0.1", "ratio-0.2"]
    assert (
        names("moe-i2", changes=["steps.0.ratio=[0.1, 0.2]", "steps.1.ratio=[0.5, 0.6]"])[1] == "expert_drop.ratio-0.1_low_rank.ratio-0.6"
    )
    assert names("expert-drop", "layer-drop") == ["expert-drop", "layer-drop"]
    assert names("expert-drop") == ["expert-drop"]
    own = variants(
        {"four bits": {"steps": ["quantize"]}, "drop 25%": {"steps": [{"expert_drop": {"ratio": 0.25, "counts": ["uniform", "optimal"]}}]}}
    )
    assert [variant.name for variant in own] == ["four-bits", "drop-25-_counts-uniform", "drop-25-_counts-optimal"]
    assert own[1].varied == {"recipe": "drop 25%", "counts": "uniform"}
    with pytest.raises(UserError, match="twice"):
        variants(["expert-drop", "expert-drop"])
    searched = variants([{"steps": [{"expert_drop": {"ratio": 0.25, "search": ["none", {"genetic": {"population": [8, 16]}}]}}]}])
    assert [variant.name for variant in searched] == ["search-none", "search-genetic_population-8", "search-genetic_population-16"]
    assert searched[2].recipe().steps[0].search.population == 16  # type: ignore[union-attr]


def test_a_list_among_the_steps_is_a_choice_of_steps() -> None:
    either = [{"expert_drop": {"ratio": [0.25, 0.5]}}, [{"expert_drop": {"ratio": 0.25}}, {"low_rank": {"ratio": 0.3}}], "none"]
    found = variants([{"steps": [either, {"quantize": {"bits": [4, 8]}}]}])
    assert [variant.name for variant in found] == [
        "expert_drop_ratio-0.25_bits-4", "expert_drop_ratio-0.25_bits-8", "expert_drop_ratio-0.5_bits-4", "expert_drop_ratio-0.5_bits-8",
        "expert_drop+low_rank_bits-4", "expert_drop+low_rank_bits-8", "bits-4", "bits-8",
    ]  # fmt: skip
    assert [[step.name for step in variant.recipe().steps] for variant in found[4::2]] == [
        ["expert_drop", "low_rank", "quantize"], ["quantize"],
    ]  # fmt: skip


def test_a_step_left_out_is_not_in_the_name_and_no_step_at_all_is_no_variant() -> None:
    found = variants([{"steps": [["none", {"layer_drop": {"count": 1}}], ["none", {"quantize": {}}]]}])
    assert [variant.name for variant in found] == ["quantize", "layer_drop", "layer_drop_quantize"]
    assert [len(variant.recipe().steps) for variant in found] == [1, 1, 2]


def test_texts_are_one_value_and_lists_of_texts_are_several() -> None:
    drop = {"steps": [{"expert_drop": {"ratio": 0.25}}]}
    assert len(variants([{**drop, "calibration": {"data": ["a.txt", "b.txt"]}}])) == 1
    assert names({**drop, "calibration": {"data": [["x/a.txt", "b.txt"], ["b.txt"]]}}) == ["data-a.txt+b.txt", "data-b.txt"]


def test_names_are_those_of_folders() -> None:
    long = {"steps": [{"expert_drop": {"ratio": 0.25, "search": [{"genetic": {"population": 100 + i, "generations": 5}} for i in (0, 1)]}}]}
    same = {"steps": [{"expert_drop": {"ratio": [0.25, 0.25], "counts": ["uniform", "importance"]}}]}
    data = {
        "steps": [{"expert_drop": {"ratio": 0.25}}],
        "calibration": {"data": [["../a/x.txt"], ["/b/x.txt"], ["~/" + "y" * 300 + ".txt"]]},
    }
    for given, count in ((long, 2), (same, 2), (data, 3)):
        found = names(given)
        assert len(found) == len({name.lower() for name in found}) == count
        assert all(name == Path(name).name and not name.startswith(".") and len(name) <= 80 for name in found), found


def test_too_many_combinations_and_empty_lists_are_refused() -> None:
    with pytest.raises(UserError, match="more than 500 combinations"):
        variants([{"steps": [{"low_rank": {"ratio": [i / 100 for i in range(1, 40)], "alpha": [i / 100 for i in range(20)]}}]}])
    with pytest.raises(UserError, match=r"steps.0.expert_drop.ratio is an empty list"):
        variants([{"steps": [{"expert_drop": {"ratio": []}}]}])
    with pytest.raises(UserError, match="several values are for trimoe sweep"):
        recipes.load(DROP)
