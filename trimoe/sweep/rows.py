"""How the variants of a sweep stand: one row each, the frontier among them, as a table, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimoe.checkpoint.atomic import write_text
from trimoe.errors import UserError
from trimoe.output.record import Record
from trimoe.progress import Reporter
from trimoe.show.frontier import of_mean_kl, unbeaten
from trimoe.sweep.grid import Variant


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured variant. `share`, `experts`, `active`: of the original's bytes, routed-expert and active parameters. `kl` in nats per
    token, mean over texts, with its interval where the evaluation gives one; `perplexity` is the geometric mean over texts. `tasks`: values of
    lm-eval's tasks by "TASK METRIC [FILTER]" ({value, stderr, before, difference_stderr}), of those asked for and of a group's members; `accuracy`:
    the mean `acc` of those asked for, None without any."""

    name: str
    varied: dict[str, str]
    method: str
    bytes: int
    share: float
    experts: float
    active: float
    kl: float
    kl_low: float | None
    kl_high: float | None
    agreement: float
    perplexity: float
    perplexity_before: float
    texts: dict[str, dict[str, float]]
    kept: bool
    tasks: dict[str, dict[str, float | None]] = field(default_factory=dict)
    accuracy: float | None = None
    accuracy_before: float | None = None

    @classmethod
    def of(cls, variant: Variant, record: Record, *, kept: bool) -> Row:
        """From a finished folder's record with its evaluation."""
        before, after, report, texts = record.before, record.after, record.evaluation, record.texts
        steps, trained = [step.name for step in record.steps], [entry["method"] for entry in record.recovered]
        low, high = of_mean_kl(texts)
        asked = [row for row in report.get("tasks") or () if row["part_of"] is None]
        shown = [row for row in report.get("tasks") or () if row["part_of"] in (None, *(row["task"] for row in asked))]
        accuracies = [row for row in asked if row["metric"] == "acc"]
        return cls(
            name=variant.name, varied=variant.varied, method=" + ".join([*steps, *trained]), bytes=after["file_bytes"],
            share=record.share, experts=after["experts"] / before["experts"],
            active=after["active"] / before["active"], kl=report["mean_kl"], kl_low=low, kl_high=high,
            agreement=sum(text["agreement"] for text in texts) / len(texts),
            perplexity=_geometric([text["perplexity"] for text in texts]),
            perplexity_before=_geometric([text["against"]["perplexity"] for text in texts]),
            texts={text["name"]: {"kl": text["kl"], "perplexity": text["perplexity"]} for text in texts},
            tasks={
                " ".join([row["task"], row["metric"], *([row["filter"]] if "filter" in row else [])]): {
                    "value": row["value"], "stderr": row["stderr"], "before": row["against"]["value"], "difference_stderr": row["difference_stderr"],
                } for row in shown
            },
            accuracy=_mean([row["value"] for row in accuracies]), accuracy_before=_mean([row["against"]["value"] for row in accuracies]), kept=kept,
        )  # fmt: skip

    def __str__(self) -> str:
        tasks = f", acc {self.accuracy_before:.3f} -> {self.accuracy:.3f}" if self.accuracy is not None else ""
        return f"{self.name}: {self.share:.1%} of the bytes, KL {self.kl:.4f}, perplexity {self.perplexity_before:.2f} -> {self.perplexity:.2f}{tasks}"


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def frontier(rows: Sequence[Row]) -> set[str]:
    """Names of the rows that no other beats in size and KL."""
    return {row.name for row, best in zip(rows, unbeaten([(row.share, row.kl) for row in rows]), strict=True) if best}


def write_tables(out: Path, rows: Sequence[Row], pending: Sequence[str], command: str | None) -> None:
    """sweep.csv and sweep.json, whole at any time."""
    best = frontier(rows)
    body = [_finite({**row.__dict__, "frontier": row.name in best, "recipe": f"{row.name}.yaml"}) for row in rows]
    write_text(out / "sweep.json", json.dumps({"command": command, "variants": body, "pending": list(pending)}, indent=1) + "\n")
    varied = list(dict.fromkeys(key for row in rows for key in row.varied))
    texts = list(dict.fromkeys(name for row in rows for name in row.texts))
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow([
        "variant", "frontier", *varied, "method", "bytes", "share", "experts", "active", "kl", "kl_low", "kl_high", "agreement", "perplexity",
        "perplexity_before", *(f"{what} {name}" for name in texts for what in ("kl", "perplexity")),
        *(["accuracy", "accuracy_before"] if tasks else []), *(f"{what}{name}" for name in tasks for what in ("", "stderr ", "before ")), "kept",
    ])  # fmt: skip
    for row in rows:
        writer.writerow([
            row.name, "yes" if row.name in best else "", *(row.varied.get(key, "") for key in varied), row.method, row.bytes, row.share,
            row.experts, row.active, row.kl, row.kl_low, row.kl_high, row.agreement, row.perplexity, row.perplexity_before,
            *(row.texts.get(name, {}).get(what, "") for name in texts for what in ("kl", "perplexity")),
            *([row.accuracy, row.accuracy_before] if tasks else []),
            *(row.tasks.get(name, {}).get(what, "") for name in tasks for what in ("value", "stderr", "before")), "yes" if row.kept else "",
        ])  # fmt: skip
    write_text(out / "sweep.csv", lines.getvalue())


def _finite(value: Any) -> Any:
    """As JSON has it: no number where there is none."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Row]) -> None:
    """The rows on standard output, the smallest first; a star is on the frontier. Where there is little room, without the columns that
    matter least."""
    from trimoe.show.table import Fitting, Table, show

    cells, best = [], frontier(rows)
    for row in sorted(rows, key=lambda row: (row.bytes, row.kl)):
        between = f"{row.kl_low:.4f}-{row.kl_high:.4f}" if row.kl_low is not None else ""
        cells.append(("*" if row.name in best else "", row.name, f"{row.share:.1%}", f"{row.active:.1%}", f"{row.kl:.4f}", between, f"{row.agreement:.1%}",
            f"{row.perplexity:.2f}", _accuracy(row.accuracy)))  # fmt: skip
    if rows:
        before, accuracy = f"{rows[0].perplexity_before:.2f}", _accuracy(rows[0].accuracy_before)
        cells.append(("", "original", "100.0%", "100.0%", "0", "", "100.0%", before, accuracy))
    made = Table(head=("", "variant", "bytes", "active", "KL", "95 %", "agrees", "perplexity", "acc"), rows=cells, words=range(2))
    if not any(row.accuracy is not None for row in rows):
        made = made.without("acc")
    show(Fitting([made, made.without("95 %"), made.without("95 %", "agrees"), made.without("95 %", "agrees", "active")]))
    print("* no other variant is as small and as near to the original.\n  KL(original || variant) in nats/token, mean of texts")


def _accuracy(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def plot(out: Path, rows: Sequence[Row], reporter: Reporter) -> None:
    """sweep.html and figures/frontier.svg; one line says so where the plotting libraries are missing."""
    try:
        from trimoe.report.charts import frontier as chart
        from trimoe.report.page import charts_page, write_figures
        from trimoe.report.section import Figure, Section
        from trimoe.show.table import Table
    except (ImportError, UserError):
        reporter.say("The frontier is not drawn: that needs the plotting libraries; pip install 'trimoe[report]', then run this again.")
        return
    points = [
        {"name": row.name, "method": row.method, "bytes": row.bytes, "share": row.share, "kl": row.kl, "kl_low": row.kl_low, "kl_high": row.kl_high}
        for row in rows if math.isfinite(row.kl)
    ]  # fmt: skip
    if not points:
        return
    best = frontier(rows)
    cells = [
        [row.name, f"{row.bytes:,}", f"{row.share:.1%}", f"{row.kl:.4f}", f"{row.perplexity:.2f}", "yes" if row.name in best else "no"] for row in rows
    ]  # fmt: skip
    beside = Table(
        caption="The variants", head=["variant", "bytes", "share", "KL, nats/token", "perplexity", "on the frontier"], rows=cells
    )
    drawn = Figure(name="frontier", title="Size against nearness to the original", chart=chart(points), table=beside)
    sections = [
        Section(name="variants", title="Variants", text="No other variant is as small and as near as those on the line.", blocks=[drawn])
    ]
    write_text(out / "sweep.html", charts_page(f"Sweep: {out.resolve().name}", sections))
    write_figures(out / "figures", sections, reporter)
