"""What lies in a finished folder's record and card: put there, read back, from strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimoe import UserError, card, tables
from trimoe.cli.options import check_writable
from trimoe.evaluate import origin
from trimoe.standings import Row, frontier

TEXTS: dict[str, Any] = {"model": "m", "against": "o", "length": 64, "stride": 32, "texts": [{"name": "a", "kl": 0.1}], "mean_kl": 0.1}
TASKS: dict[str, Any] = {"model": "m", "against": "o", "length": 8, "stride": 4, "texts": [], "tasks": [{"task": "t", "value": 0.5}]}


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(card, "text", lambda record: str(sorted(record)))
    (tmp_path / "trimoe.json").write_text('{"plan": {}}', encoding="utf-8")
    return tmp_path


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "trimoe.json").read_text(encoding="utf-8"))["evaluation"]
    return found


@pytest.mark.parametrize("order", [(TEXTS, TASKS), (TASKS, TEXTS)])
def test_texts_and_tasks_stand_beside_each_other(order: tuple[dict[str, Any], ...], finished: Path) -> None:
    for report in order:
        card.add_evaluation(finished, report)
    assert kept(finished) == {**TEXTS, "tasks": TASKS["tasks"]}


def test_a_new_evaluation_replaces_what_it_measured_again(finished: Path) -> None:
    card.add_evaluation(finished, TEXTS)
    card.add_evaluation(finished, {**TEXTS, "length": 32, "mean_kl": 0.2})
    assert kept(finished)["length"] == 32 and kept(finished)["mean_kl"] == 0.2


def test_tasks_alone_are_recorded_and_the_card_says_that_texts_are_missing(finished: Path) -> None:
    card.add_evaluation(finished, TASKS)
    assert kept(finished) == TASKS
    assert card._quality(TASKS).startswith("Not evaluated yet")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: [en]\n---\n# A model\n", {"license": "mit", "language": ["en"]}),
        ("---\ncreated: 2024-02-30\n---\n", {}),
        ("---\na: " + "[" * 5000 + "\n---\n", {}),
        ("---\nlicense: mit\nsize: !!int ''\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\n", {}),
        ("---" + "\n" * 100_000, {}),
        ("# A model\n", {}),
        ("", {}),
    ],
)
def test_a_source_card_gives_its_licence_or_nothing(text: str, found: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert card.inherited(tmp_path) == found


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"model": "m"}', '{"model": "m", "inputs": []}'])
def test_a_damaged_record_is_a_mistake_of_the_user(record: str, tmp_path: Path) -> None:
    (tmp_path / "trimoe.json").write_text(record, encoding="utf-8")
    with pytest.raises(UserError, match=r"trimoe\.json does not read as trimoe writes it"):
        origin(tmp_path)
    if '"model"' not in record:
        with pytest.raises(UserError, match=r"trimoe\.json does not read as trimoe writes it"):
            card.made_from(tmp_path)


def test_results_do_not_replace_files_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="is a file of a model's folder"):
        check_writable(tmp_path / "config.json")
    check_writable(tmp_path / "new.json")
    (tmp_path / "eval.json").write_text("{}", encoding="utf-8")
    check_writable(tmp_path / "eval.json")  # of an earlier evaluation
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "{}" and not (tmp_path / "new.json").exists()


def test_numbers_that_are_none_are_on_no_frontier() -> None:
    def row(name: str, size: int, kl: float) -> Row:
        return Row(
            name=name, varied={}, method="m", bytes=size, share=0.5, experts=0.5, active=0.5, kl=kl, kl_low=None, kl_high=None, agreement=0.9,
            perplexity=9.0, perplexity_before=8.0, texts={}, kept=True,
        )  # fmt: skip

    rows = [row("a", 1, 0.3), row("b", 2, 0.1), row("c", 3, 0.2), row("nan", 1, float("nan")), row("inf", 0, float("inf"))]
    assert frontier(rows) == {"a", "b"}


def test_names_in_tables_are_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ends = {"kl": [0.04781, 0.08123], "perplexity": [68.9123, 101.2345], "against_perplexity": [60.1, 70.2], "agreement": [0.8, 0.9]}
    row = {"name": "[/x]", "tokens": 64, "perplexity": 80.5, "against": {"perplexity": 65.25}, "kl": 0.0612, "agreement": 0.85,
           "intervals": ends, "resampled": "documents"}  # fmt: skip
    tables.evaluation({"model": "m[v2]", "against": "o", "length": 64, "stride": 32, "texts": [row]})
    shown = capsys.readouterr().out
    assert "m[v2]" in shown and "[/x]" in shown
    assert "0.0478-0.0812" in shown and "68.912-101.234" in shown and "80.0-90.0%" in shown
