"""The section on a search for experts to drop, beside other ways to choose them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimoe.output.record import Step
from trimoe.report import charts
from trimoe.report.section import Figure, Section
from trimoe.show.format import runs
from trimoe.show.table import Table

OPTIMUM = "all sets (optimum)"
STEPS = 40  # points of an averaged trace
INSTEAD = " In layers {layers} the experts of the lowest gate went in their place: sets that half of the tokens chose did worse than these on the other half."


def section(step: Step) -> Section | None:
    layers = {index: row for index, row in step.layers.items() if row.get("losses") and row.get("greedy") is not None}
    if not layers:
        return None
    way = step.fields.get("search")
    how = next(iter(way)) + " search" if isinstance(way, dict) and way else f"lowest {str(step.fields.get('score')).replace('_', ' ')}"
    population = next(iter(way.values())).get("population") if isinstance(way, dict) and "genetic" in way else None
    instead = sorted(step.metrics.get("gate_instead") or ())
    blocks = [figure for figure in (_found(layers, how), _trace(layers, how, population)) if figure is not None]
    return Section(
        name="search", title="The search for which experts go", blocks=blocks,
        text=f"Experts were chosen by {how}. The loss is the relative error of a layer's output on calibration tokens, re-routed without the "
        "dropped experts. Lower is better." + (INSTEAD.format(layers=runs(instead)) if instead else ""),
    )  # fmt: skip


def _found(layers: dict[int, dict[str, Any]], how: str) -> Figure:
    names = {how: lambda row: row["losses"][0], "greedy": lambda row: row["greedy"], "random sets, mean": lambda row: row["random"],
             OPTIMUM: lambda row: row.get("exhaustive")}  # fmt: skip
    if how == "exhaustive search":
        del names[OPTIMUM]
    if how == "greedy search":
        del names["greedy"]
    rows = [
        {"layer": f"layer {index}", "loss": value, "way": name}
        for index, row in layers.items() for name, get in names.items() if (value := get(row)) is not None
    ]  # fmt: skip
    used = [name for name in names if any(row["way"] == name for row in rows)]
    return Figure(
        name="search-losses", title="Loss in each layer, by the way of choosing",
        chart=charts.dots(rows, y="layer", x="loss", x_title="relative loss of the layer", series="way", order=used, zero=True),
        table=Table(
            caption="Loss in each layer", head=("layer", "dropped", "evaluations", *used),
            rows=[
                (str(index), str(row["dropped"]), f"{row['evaluations']:,}",
                 *(f"{value:.4f}" if (value := names[name](row)) is not None else "-" for name in used))
                for index, row in layers.items()
            ],
        ),
    )  # fmt: skip


GENETIC = (
    " A generation of the search draws {population} sets; one that was seen before is not evaluated again. The search starts from greedy's sets: what "
    "it computes begins with theirs, smaller sets among them, so there may be more losses than sets of the size that is searched."
)
BOTH = " Greedy reached what the {how} did in every layer: their lines end on each other."


def _trace(layers: dict[int, dict[str, Any]], how: str, population: int | None) -> Figure | None:
    """Over all layers: the best loss so far over the best that any way found, by evaluations."""
    layers = {index: row for index, row in layers.items() if row.get("random_trace") and row["losses"][0] > 0}
    if not layers:
        return None
    floor = {
        index: min(
            value for value in (row["losses"][0], row["greedy"], row.get("exhaustive"), row["random_trace"][-1][1]) if value is not None
        )
        for index, row in layers.items()
    }
    layers = {index: row for index, row in layers.items() if floor[index] > 0}
    end = max((max(row["evaluations"], row["random_trace"][-1][0]) for row in layers.values()), default=0)
    if end < 2:
        return None
    grid = sorted({round(math.exp(math.log(end) * at / (STEPS - 1))) for at in range(STEPS)})
    series = {"random, best so far": "random_trace"} | (
        {how: "trace"} if any(len(row.get("trace") or ()) > 0 for row in layers.values()) else {}
    )
    rows = []
    for name, key in series.items():
        for at in grid:
            ratios = [best / floor[index] for index, row in layers.items() if (best := _best(row.get(key) or (), at)) is not None]
            if len(ratios) == len(layers):
                rows.append({"evaluations": at, "loss": sum(ratios) / len(ratios), "way": name})
    greedy = sum(row["greedy"] / floor[index] for index, row in layers.items()) / len(layers)
    rows += [{"evaluations": at, "loss": greedy, "way": "greedy"} for at in (grid[0], grid[-1])]
    if all(row.get("exhaustive") for row in layers.values()):
        best = sum(row["exhaustive"] / floor[index] for index, row in layers.items()) / len(layers)
        rows += [{"evaluations": at, "loss": best, "way": OPTIMUM} for at in (grid[0], grid[-1])]
    known = [how, "greedy", OPTIMUM, "random, best so far"]
    order = [name for name in known if any(row["way"] == name for row in rows)] if how in series else None
    note = "1 is the best loss that any way found in a layer (the optimum, where all sets were evaluated)."
    same = how != "greedy search" and "trace" in series.values() and all(row["greedy"] <= row["losses"][0] for row in layers.values())
    return Figure(
        name="search-trace", title="Best loss so far, mean over the layers",
        chart=charts.lines(rows, x="evaluations", y="loss", x_title="losses computed", y_title="loss / best found by any way",
                           series="way", log_x=True, log_y=True, step=True, order=order),
        note=note + (GENETIC.format(population=population) if population else "") + (BOTH.format(how=how) if same else ""),
        table=Table(
            caption="Best loss so far", head=("way", "evaluations", "loss / best found"),
            rows=[(row["way"], f"{row['evaluations']:,}", f"{row['loss']:.4f}") for row in rows],
        ),
    )  # fmt: skip


def _best(trace: Sequence[Sequence[float]], at: int) -> float | None:
    return next((value for evaluations, value in reversed(trace) if evaluations <= at), None)
