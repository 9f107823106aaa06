"""Which results no other beats."""

from __future__ import annotations

from trimoe import standings
from trimoe.standings import Row, frontier


def row(name: str, size: int, kl: float) -> Row:
    return Row(
        name=name, varied={}, method="expert_drop", bytes=size, share=size / 100, experts=1, active=1, kl=kl, kl_low=None, kl_high=None,
        agreement=1, perplexity=2, perplexity_before=1, texts={}, kept=False,
    )  # fmt: skip


def test_the_frontier_is_what_nothing_beats() -> None:
    rows = [row("small", 50, 0.5), row("worse", 60, 0.6), row("large", 80, 0.1), row("twin", 80, 0.1), row("same size", 50, 0.7)]
    assert frontier(rows) == {"small", "large", "twin"}
    assert standings.unbeaten([(0.5, 0.5), (0.6, 0.6), (0.5, 0.5), (0.4, float("nan")), (0.3, 0.9)]) == [True, False, True, False, True]
    assert standings.unbeaten([(0.5, 2e-8), (0.6, 1e-8), (0.7, -0.0)]) == [True, False, False], "what rounding leaves decides nothing"


def test_what_has_no_number_is_never_on_the_frontier() -> None:
    rows = [row("broken", 10, float("nan")), row("burst", 20, float("inf")), row("good", 50, 0.5)]
    assert frontier(rows) == {"good"} == frontier(rows[::-1])
