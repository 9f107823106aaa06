"""The section on experts and layers: how much each matters, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimoe.output.record import Record
from trimoe.report import charts
from trimoe.report.charts import alt
from trimoe.report.section import Figure, Section
from trimoe.show.table import Table

DENSE_CELLS = 3000  # cells from which a heat map is painted, not drawn


def section(record: Record) -> Section | None:
    blocks = [figure for figure in (_importance(record), _counts(record), *_minded(record)) if figure is not None]
    if not blocks:
        return None
    return Section(
        name="experts", title="Experts and layers", blocks=blocks,
        text="Which experts mattered on the calibration text, which were kept, and how much each layer minds.",
    )  # fmt: skip


def _importance(record: Record) -> Figure | None:
    """Scores of a drop in all of the original's experts; where there was none, the importance or the tokens that low_rank went by."""
    before = {row["layer"]: row["experts"] for row in record.layers}
    for step in record.steps:
        scores = {index: row["score"] for index, row in step.layers.items() if row.get("score")}
        title = str(step.fields.get("score", "leave_one_out"))
        if step.name == "low_rank":
            scores = {int(index): values for index, values in (step.metrics.get("score") or {}).items()}
        scores = {index: values for index, values in scores.items() if before.get(index) == len(values)}
        if scores:
            break
    else:
        routed: dict[str, Any] = next(
            (step.metrics["tokens_per_expert"] for step in record.steps if step.metrics.get("tokens_per_expert")), {}
        )
        scores = {int(index): values for index, values in routed.items() if before.get(int(index)) == len(values)}
        title = "tokens routed"
    if not scores:
        return None
    tokens = {index: row.get("tokens_per_expert") for step in record.steps for index, row in step.layers.items()}
    rows = []
    for index, values in sorted(scores.items()):
        kept, most = set(record.decisions[index].keep), max(values) or 1.0
        gone = record.decisions[index].gone is not None
        counts = tokens.get(index) or []
        total = sum(counts)
        for expert, value in enumerate(values):
            rows.append(
                {"layer": index, "expert": expert, "share": value / most, "score": value, "dropped": gone or expert not in kept,
                 "what": "dropped" if gone or expert not in kept else "kept",
                 "tokens": counts[expert] / total if total and len(counts) == len(values) else None}
            )  # fmt: skip
    some = any(row["dropped"] for row in rows)
    more = [alt.Tooltip("score:Q", title=title, format=".3~g"), alt.Tooltip("what:N", title="decision")]
    if any(row["tokens"] is not None for row in rows):
        more.append(alt.Tooltip("tokens:Q", title="of the routed tokens", format=".1%"))
    width = max(len(values) for values in scores.values())
    return Figure(
        name="importance", title=f"Importance of each expert ({title.replace('_', ' ')})" + (", and what was kept" if some else ""),
        chart=charts.heat(rows, value="share", title="share of the layer's most important", marked="dropped", limits=(0.0, 1.0), more=more,
                          across="expert, by its number in the original"),
        note="Dark is important to its layer on a light page, light on a dark one." + (" A cross marks the experts that were dropped." if some else ""),
        wide=90 + 22 * width if width > 10 else 0, dense=len(rows) > DENSE_CELLS,
        table=Table(
            caption=f"scores of each expert ({title.replace('_', ' ')})", head=("layer", "kept", "dropped", "scores, expert 0 first (dropped in brackets)"),
            rows=[
                (str(index), str(len(record.decisions[index].keep)),
                 ", ".join(str(row["expert"]) for row in rows if row["layer"] == index and row["dropped"]) or "none",
                 ", ".join(f"[{row['score']:.3g}]" if row["dropped"] else f"{row['score']:.3g}" for row in rows if row["layer"] == index))
                for index in sorted(scores)
            ],
            words=range(4),
        ),
    )  # fmt: skip


def _counts(record: Record) -> Figure | None:
    found = [row for row in record.layers if row["experts"]]
    if all(row["kept"] == row["experts"] for row in found):
        return None
    rows = [{"layer": row["layer"], "experts": row["kept"], "what": "kept"} for row in found]
    rows += [{"layer": row["layer"], "experts": row["experts"] - row["kept"], "what": "dropped"} for row in found]
    return Figure(
        name="counts", title="Experts kept in each layer",
        chart=charts.bars(rows, x="layer", y="experts", x_title="layer", y_title="experts", series="what", stacked=True, faint="dropped", form="d"),
        wide=60 + 16 * len(found) if len(found) > 20 else 0,
        table=Table(
            caption="Experts kept in each layer", head=("layer", "before", "kept"),
            rows=[(str(row["layer"]), str(row["experts"]), str(row["kept"])) for row in found],
        ),
    )  # fmt: skip


def _minded(record: Record) -> list[Figure]:
    """Per layer: the mean leave-one-out loss, and the measured sensitivity of the model's end."""
    figures = []
    for number, step in enumerate(record.steps):
        mean, which = {}, f"-{number + 1}" if number else ""
        for index, row in step.layers.items():
            values = row.get("leave_one_out") or (row.get("score") if step.fields.get("score") == "leave_one_out" else None)
            if values:
                mean[index] = sum(values) / len(values)
        if mean:
            raw = step.fields.get("score") == "leave_one_out" and step.fields.get("normalize") == "none"
            figures.append(
                by_layer(f"layer-importance{which}", "Importance of each layer", mean, "mean leave-one-out loss",
                          f"The mean over a layer's experts of the {'' if raw else 'relative '}error of its output when that one expert is missing.")
            )  # fmt: skip
        sensitive = {int(index): value for index, value in (step.metrics.get("sensitivity") or {}).items()}
        if sensitive:
            what = "its experts pruned" if step.name == "expert_drop" else "its experts' outputs shrunk"
            figures.append(
                by_layer(f"sensitivity-{step.name.replace('_', '-')}{which}", f"How much the model minds each layer, as {step.name} measured it",
                          sensitive, "KL per squared error",
                          f"What the next-token distributions of the whole model lose (KL) with one layer changed ({what}), over its squared error.")
            )  # fmt: skip
    return figures


def by_layer(name: str, title: str, values: Mapping[int, float], y_title: str, note: str) -> Figure:
    """One number of each layer."""
    rows = [{"layer": index, "value": value} for index, value in sorted(values.items())]
    return Figure(
        name=name, title=title, note=note, wide=60 + 16 * len(rows) if len(rows) > 20 else 0,
        chart=charts.bars(rows, x="layer", y="value", x_title="layer", y_title=y_title, height=200),
        table=Table(caption=title, head=("layer", y_title), rows=[(str(row["layer"]), f"{row['value']:.4g}") for row in rows]),
    )  # fmt: skip
