"""What evaluations leave in a finished folder's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimoe import card

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
