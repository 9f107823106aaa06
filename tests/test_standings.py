"""Which results no other beats."""

from __future__ import annotations

import dataclasses

import pytest

from trimoe.sweep import rows as standings
from trimoe.sweep.rows import Row, frontier


def row(name: str, size: int, kl: float) -> Row:
    return Row(
        name=name, varied={}, method="expert_drop", bytes=size, share=size / 100, experts=1, active=1, kl=kl, kl_low=None, kl_high=None,
        agreement=1, perplexity=2, perplexity_before=1, texts={}, kept=False,
    )  # fmt: skip


def test_the_frontier_is_what_nothing_beats() -> None:
    rows = [row("small", 50, 0.5), row("worse", 60, 0.6), row("large", 80, 0.1), row("twin", 80, 0.1), row("same size", 50, 0.7)]
    assert frontier(rows) == {"small", "large", "twin"}
    assert standings.unbeaten([(0.5, 0.5), (0.6, 0.6), (0.5, 0.5), (0.4, float("nan")), (0.3, 0.9)]) == [True, False, True, False, True]
    assert standings.unbeaten([(0.56381, 0.04), (0.56378, 0.33)]) == [True, False], "sizes that read alike are alike"
    assert standings.unbeaten([(0.5, 2e-8), (0.6, 1e-8), (0.7, -0.0)]) == [True, False, False], "what rounding leaves decides nothing"


@pytest.mark.parametrize("tasks", [{}, {"accuracy": 0.5, "accuracy_before": 0.75}])
def test_numbers_of_a_table_are_whole_in_80_columns(tasks: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dataclasses.replace(row(f"ratio-0.{n}_score-leave_one_out", 10 * n, 0.1234), kl_low=0.1111, kl_high=0.2222, perplexity=123.45, **tasks)
            for n in (125, 5)]  # fmt: skip
    standings.table(rows)
    shown = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in shown) and "perplexity" in shown[0]
    lines = [line for line in shown if "ratio" in line]
    assert len(lines) == 2 and all(word in line for line in lines for word in ("0.1234", "123.45", *(["0.500"] if tasks else [])))
    assert ("0.750" in next(line for line in shown if "original" in line)) == bool(tasks)


def test_what_has_no_number_is_never_on_the_frontier() -> None:
    rows = [row("broken", 10, float("nan")), row("burst", 20, float("inf")), row("good", 50, 0.5)]
    assert frontier(rows) == {"good"} == frontier(rows[::-1])
