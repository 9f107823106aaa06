"""The papers' benchmarks: every row is a recipe that plans, every number has a source and a row, and the check of orders can fail."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.sweep.grid import variants
from trimoe.sweep.rows import Row

FOLDER = Path(__file__).parents[1] / "benchmarks" / "papers"
PAPERS = {"moe_i2": "Mixtral-8x7B", "holistic": "Mixtral-8x7B", "moe_pruner": "Mixtral-8x7B"}


@pytest.fixture(scope="module", autouse=True)
def _path() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return Skeleton.of("builtin:mini-mixtral", weights=False)


def script(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_row_of_a_paper_plans(paper: str, skeleton: Skeleton) -> None:
    rows = script(paper).recipes(PAPERS[paper], 100)
    assert len(variants(rows)) == len({json.dumps(recipe) for recipe in rows.values()})
    for name, recipe in rows.items():
        plan = trimoe.plan(skeleton, recipe)
        assert plan.after.experts <= plan.before.experts, name


def test_every_row_of_the_ablations_plans(skeleton: Skeleton, tmp_path: Path) -> None:
    ablations = script("ablations")
    for name in ("calib-english", "calib-code"):  # as many tokens as the recipes ask for, or plan refuses the text
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": "word " * 2000}) for _ in range(200)))
    texts = [f"{tmp_path}/calib-english.jsonl", f"code={tmp_path}/calib-code.jsonl"]
    found = {"counts": ablations.counts(), "mixed": ablations.mixed(), "recovery": ablations.recovery(), "size": ablations.size()}
    found["domain"] = ablations.domain(texts)
    assert [name for name in found["domain"] if name.startswith("drop")] == [
        "drop 25% on calib-english",
        "drop 25% on calib-code",
        "drop 25% on all",
    ]
    for question, rows in found.items():
        assert len(variants(rows)) == len(rows), question
        for recipe in rows.values():
            trimoe.plan(skeleton, recipe)


def test_thresholds_drop_one_part_more_each() -> None:
    similar = {("moe", index): value for index, value in enumerate([0.5, 0.9, 0.7, 0.8])}
    found = script("ablations").thresholds(similar, most=3)
    assert found == pytest.approx([0.85, 0.75, 0.6])
    assert [sum(value > threshold for value in similar.values()) for threshold in found] == [1, 2, 3]


@pytest.mark.parametrize("paper", PAPERS)
def test_the_papers_numbers_have_a_source_and_rows_that_are_run(paper: str) -> None:
    about, rows = script("comparison").paper(paper), script(paper).recipes(PAPERS[paper], 100)
    assert about["arxiv"] and len(about["read"]) > 40 and about["tables"] and about["claims"]
    for table in about["tables"]:
        assert table["judged"] in table["columns"] and table["better"] in ("lower", "higher")
        for name, numbers in table["rows"].items():
            assert name == "dense" or name in rows, f"{name} of table {table['number']} is not run"
            assert len(numbers) == len(table["columns"]) and all(math.isfinite(number) for number in numbers)
        if "average" in table["columns"][1:] and len(table["columns"]) > 3:  # the average of what stands before it, as a check on copying
            tasks = [place for place, column in enumerate(table["columns"][:-1]) if column not in ("speedup", "teraflops", "memory GB")]
            for name, numbers in table["rows"].items():
                if name in table.get("misprints", {}):
                    continue
                mean = sum(numbers[place] for place in tasks) / len(tasks)
                assert numbers[-1] == pytest.approx(mean, abs=0.1), f"{name} of table {table['number']}"
    for claim in about["claims"]:
        assert {claim["better"], claim["worse"], *claim.get("since", {}).values()} <= set(rows)


def row(name: str, kl: float, perplexity: float, **more: Any) -> Row:
    return Row(
        name=name, varied={}, method="", bytes=1, share=1, experts=1, active=1, kl=kl, kl_low=None, kl_high=None, agreement=1,
        perplexity=perplexity, perplexity_before=10, texts={}, kept=False, **more,
    )  # fmt: skip


def test_an_order_that_is_not_the_papers_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    comparison = script("comparison")
    table = {"number": 1, "model": "m", "columns": ["speed", "average"], "judged": "average", "better": "higher",
             "rows": {"dense": [1, 70], "good": [2, 60], "bad": [3, 50], "level": [3, 50], "not run": [4, 40]}}  # fmt: skip
    same = comparison.pairs(table, {"dense": 0.0, "good": 0.1, "bad": 0.2, "level": 0.3})
    assert all(pair.holds for pair in same if "not run" not in (pair.better, pair.worse)) and len(same) == 9
    assert [pair.holds for pair in same if pair.worse == "not run"] == [None] * 4
    assert {(pair.better, pair.worse) for pair in same}.isdisjoint({("bad", "level"), ("level", "bad")})
    turned = comparison.pairs({**table, "better": "lower"}, {"dense": 0.0, "good": 0.1, "bad": 0.2, "level": 0.3})
    assert not any(pair.holds for pair in turned if "not run" not in (pair.better, pair.worse))

    rows = {"good": row("good", 0.3, 11.0), "bad": row("bad", 0.2, 12.0)}
    says = {"says": "good is good", "better": "good", "worse": "bad"}
    assert comparison.claim(says, rows)[0].holds is False and comparison.claim({**says, "by": "perplexity"}, rows)[0].holds is True
    trained = rows | {"good + train": row("good + train", 0.1, 10.5), "bad + train": row("bad + train", 0.15, 11.0)}
    won = {"says": "wins more", "better": "good + train", "worse": "bad + train", "since": {"better": "good", "worse": "bad"}}
    pair, numbers = comparison.claim(won, trained)
    assert pair.holds is True and numbers == pytest.approx({"good + train": -0.2, "bad + train": -0.05})
    assert comparison.claim({**won, "by": "perplexity"}, trained)[0].holds is False and comparison.claim(won, rows)[0].holds is None
    about = {"title": "T", "arxiv": "1", "read": "there", "tables": [table], "claims": [says, {**says, "better": "absent"}]}
    comparison.show(about, rows, "m")
    printed = capsys.readouterr().out
    assert (
        "DOES NOT HOLD: good is good" in printed
        and "was not run" in printed
        and "2 of 3 pairs in the paper's order by KL; here bad before good" in printed
    )

    comparison.show(
        about, {name: row(name, 0.3, 11.0, accuracy=acc, accuracy_before=0.8) for name, acc in (("good", 0.7), ("bad", 0.6))}, "m"
    )
    printed = capsys.readouterr().out
    assert "acc 0.800 -> 0.700" in printed and "3 of 3 pairs in the paper's order by accuracy" in printed
