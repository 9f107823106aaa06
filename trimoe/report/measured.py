"""Sections on what was measured: held-out text, tasks, generation, traffic, recovery."""

from __future__ import annotations

from typing import Any

from trimoe.output.record import Record
from trimoe.report import charts
from trimoe.report.section import Figure, Section
from trimoe.show.table import Table

BEFORE, AFTER = "original", "compressed"
SIDES = [BEFORE, AFTER]
WAYS = ("greedy", "sampled")  # to continue a prompt
SURE = 1.96  # standard errors either side hold 95 %


def sections(record: Record) -> list[Section]:
    """Those that the record has numbers for."""
    made = [_texts(record), _tasks(record), _generation(record), _recovery(record), _traffic(record)]
    return [section for section in made if section is not None]


def ranged(value: str, low: float | None, high: float | None, form: str) -> str:
    """'1.23 (1.20 to 1.26)'."""
    return value if low is None or high is None else f"{value} ({low:{form}} to {high:{form}})"


def interval(row: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    """Return the 95 % interval of a text's number, where the evaluation has one."""
    low, high = (row.get("intervals") or {}).get(name) or (None, None)
    return low, high


# ---- text


def _texts(record: Record) -> Section | None:
    texts = record.texts
    if not texts:
        return None
    against = [row for row in texts if row.get("against")]
    sure = any(row.get("intervals") for row in texts)
    blocks = [_perplexity(texts)]
    if against:
        blocks += [
            _one_number(against, "kl", "KL to the original, by text", "KL, nats/token", ".4f"),
            _one_number(against, "agreement", "How often the most likely next token is the original's", "top-1 agreement", ".1%"),
        ]
    windows = f"Windows of {record.evaluation['length']} tokens, stride {record.evaluation['stride']}."
    units = sorted({str(row["resampled"]) for row in texts if row.get("resampled")})
    return Section(
        name="quality", title="Quality on held-out text", blocks=blocks,
        text=f"{windows} Perplexity flatters compressed models: look at the KL."
        + (f" Whiskers: 95 % bootstrap intervals{' over ' + ' or '.join(units) if units else ''}." if sure else ""),
    )  # fmt: skip


def _perplexity(texts: list[dict[str, Any]]) -> Figure:
    rows = []
    for row in texts:
        low, high = interval(row, "perplexity")
        after = {"text": row["name"], "perplexity": row["perplexity"], "model": AFTER, "low": low, "high": high}
        if row.get("against"):
            low, high = interval(row, "against_perplexity")
            rows.append({"text": row["name"], "perplexity": row["against"]["perplexity"], "model": BEFORE, "low": low, "high": high})
        rows.append(after)
    return Figure(
        name="perplexity", title="Perplexity by text",
        chart=charts.bars(rows, x="text", y="perplexity", y_title="perplexity", x_title="text", series="model", form=".2f",
                          order=SIDES if len(rows) > len(texts) else None),
        table=Table(
            caption="Perplexity by text", head=("text", "model", "perplexity (95 %)"),
            rows=[(row["text"], row["model"], ranged(f"{row['perplexity']:.3f}", row["low"], row["high"], ".3f")) for row in rows],
        ),
    )  # fmt: skip


def _one_number(texts: list[dict[str, Any]], key: str, title: str, unit: str, form: str) -> Figure:
    rows = [dict(zip(("low", "high"), interval(row, key), strict=True), text=row["name"], value=row[key]) for row in texts]
    percent = form.endswith("%")
    return Figure(
        name=key, title=title,
        chart=charts.dots(rows, y="text", x="value", x_title=unit, form=form, percent=percent) if percent
        else charts.bars(rows, x="text", y="value", y_title=unit, x_title="text", form=form),
        table=Table(
            caption=title, head=("text", "documents", "tokens", f"{unit} (95 %)"),
            rows=[
                (str(text["name"]), f"{text['documents']:,}", f"{text['tokens']:,}", ranged(f"{row['value']:{form}}", row["low"], row["high"], form))
                for text, row in zip(texts, rows, strict=True)
            ],
        ),
    )  # fmt: skip


# ---- tasks


def _tasks(record: Record) -> Section | None:
    tasks = record.evaluation.get("tasks") or []
    if not tasks:
        return None
    rows, differences = [], []
    for task in tasks:
        name = f"{task['task']} ({task['metric']})"
        for side, numbers in ((BEFORE, task.get("against")), (AFTER, task)):
            if numbers:
                rows.append({"task": name, "value": numbers["value"], "model": side, **_around(numbers["value"], numbers.get("stderr"))})
        if task.get("difference") is not None:
            differences.append(
                {"task": name, "value": task["difference"], **_around(task["difference"], task.get("difference_stderr"))}
            )  # fmt: skip
    blocks = [
        Figure(
            name="tasks", title="Tasks (lm-eval), with 95 % intervals",
            chart=charts.dots(rows, y="task", x="value", x_title="value of the metric", series="model", order=SIDES if len(rows) > len(tasks) else None),
            table=Table(
                caption="Tasks", head=("task", "metric", "documents", BEFORE, AFTER, "difference"),
                rows=[
                    (str(task["task"]), str(task["metric"]), f"{task['n']:,}",
                     _with_error((task.get("against") or {}).get("value"), (task.get("against") or {}).get("stderr")),
                     _with_error(task.get("value"), task.get("stderr")),
                     _with_error(task.get("difference"), task.get("difference_stderr"), sign="+"))
                    for task in tasks
                ],
            ),
        )
    ]  # fmt: skip
    if differences:
        blocks.append(
            Figure(
                name="task-differences", title="Differences to the original, document by document",
                chart=charts.dots(differences, y="task", x="value", x_title=f"{AFTER} minus {BEFORE}", rule=0.0),
                note="Paired: both models answered the same documents. Intervals that reach over the dashed line may be chance.",
                table=Table(
                    caption="Differences", head=("task", "difference (95 %)"),
                    rows=[(row["task"], ranged(f"{row['value']:+.4f}", row["low"], row["high"], "+.4f")) for row in differences],
                ),
            )
        )  # fmt: skip
    return Section(name="tasks-section", title="Tasks", blocks=blocks)


def _around(value: float, error: float | None) -> dict[str, float | None]:
    return {"low": None, "high": None} if error is None else {"low": value - SURE * error, "high": value + SURE * error}


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.4f}" + (f" \N{PLUS-MINUS SIGN} {error:.4f}" if error is not None else "")


# ---- generation


def _generation(record: Record) -> Section | None:
    found = record.evaluation.get("generation")
    if not found:
        return None
    sides = [(side, found[key]) for side, key in ((BEFORE, "against"), (AFTER, "model")) if found.get(key)]
    names = {"loops": "in a loop", "empty": "empty", "distinct": "distinct 3-grams"}
    apart = [(how, side, numbers[how]) for how in WAYS for side, numbers in sides]
    rows = [
        {"what": f"{label},\n{how}", "share": numbers[key], "model": side}
        for key, label in names.items() for how, side, numbers in apart if numbers.get(key) is not None
    ]  # fmt: skip
    blocks: list[Figure | Table] = [
        Figure(
            name="generation-shares", title="What continuations look like",
            chart=charts.dots(rows, y="what", x="share", x_title="share", series="model", percent=True,
                              zero=True, form=".1%", order=SIDES if len(sides) > 1 else None),
            note="Shares of the continuations that end in a loop or are empty, and of their runs of three tokens that are different from all others. "
            "Greedy: the likeliest token every time; sampled: drawn, with the same seed for both models.",
            table=Table(caption="Continuations", head=("decoding", "model", *names.values()),
                        rows=[(how, side, *(f"{numbers[key]:.1%}" if numbers.get(key) is not None else "-" for key in names)) for how, side, numbers in apart]),
        )
    ]  # fmt: skip
    samples = [
        (side, how, str(sample.get("prompt", "")), str(sample[how]))
        for side, numbers in sides
        for sample in numbers.get("samples") or ()
        for how in WAYS
        if how in sample
    ]
    if samples:
        blocks.append(Table(caption="Samples", head=("model", "decoding", "prompt", "continuation"), rows=samples, words=range(4)))
    count = f"{found['prompts']} prompts of {found['prompt_tokens']} tokens, {found['new_tokens']} new ones. " if "prompts" in found else ""
    return Section(
        name="generation", title="Generation",
        text=f"{count}A smoke test of what the models write when they go on by themselves, which perplexity does not see.", blocks=blocks,
    )  # fmt: skip


# ---- recovery


def _recovery(record: Record) -> Section | None:
    if not record.recovered:
        return None
    blocks: list[Figure | Table] = []
    words = []
    for number, entry in enumerate(record.recovered, 1):
        metrics, data = entry["metrics"], entry["data"]
        words.append(
            f"Trained by {entry['method']}" + (f" from {entry['teacher']}" if entry.get("teacher") else "")
            + f" on {data['samples']:,} samples of {data['length']:,} tokens ({', '.join(map(str, data['domains']))}), {data['held']} more held out."
        )  # fmt: skip
        names = list(metrics["before"])
        blocks.append(
            Table(
                caption=f"Held-out text, training {number} ({entry['method']})", head=("number", "before", "after"),
                rows=[(name.replace("_", " "), f"{metrics['before'][name]:.4g}", f"{metrics['after'][name]:.4g}") for name in names],
            )
        )  # fmt: skip
        blocks += _curves(metrics, number)
    return Section(name="recovery", title="Recovery training", text=" ".join(words), blocks=blocks)


def _curves(metrics: dict[str, Any], number: int) -> list[Figure]:
    """What validation said on the way; layer by layer, where that is how it was trained."""
    figures = []
    curve = metrics.get("curve") or []
    for name in metrics["before"]:
        rows = [
            {"step": entry["step"], "value": entry[name], "what": name.replace("_", " ")} for entry in curve if entry.get(name) is not None
        ]
        if len(rows) > 1:
            unit = {"kl": "KL, nats/token", "loss": "loss, nats/token"}.get(name, name.replace("_", " "))
            figures.append(
                Figure(
                    name=f"recovery-{number}-{name.replace('_', '-')}", title=f"Validation: {unit}",
                    chart=charts.lines(rows, x="step", y="value", x_title="optimiser step", y_title=unit, series="what"),
                    table=Table(caption=f"Validation, {name}", head=("step", unit), rows=[(str(row["step"]), f"{row['value']:.4g}") for row in rows]),
                )
            )  # fmt: skip
    layers = metrics.get("layers") or {}
    rows = [
        {"layer": f"layer {index}", "error": row[when], "when": f"{when} training"}
        for index, row in layers.items() for when in ("before", "after") if row.get(when) is not None
    ]  # fmt: skip
    if rows:
        figures.append(
            Figure(
                name=f"recovery-{number}-layers", title="Error of each layer's experts",
                chart=charts.dots(rows, y="layer", x="error", x_title="error on held-out text", series="when", order=["before training", "after training"]),
                table=Table(caption="Error of each layer's experts", head=("layer", "before", "after"),
                            rows=[(str(index), f"{row['before']:.4g}", f"{row['after']:.4g}") for index, row in layers.items()]),
            )
        )  # fmt: skip
    return figures


# ---- traffic


def _traffic(record: Record) -> Section | None:
    ways = (record.evaluation.get("traffic") or {}).get("ways") or {}
    found = [
        (ranks, side, seen[key]) for ranks, seen in ways.items() for side, key in ((BEFORE, "against"), (AFTER, "model")) if seen.get(key)
    ]
    if not found:
        return None
    rows = [{"ranks": ranks, "bytes": one["bytes_per_token"], "model": side} for ranks, side, one in found]
    title = "Bytes per token that all-to-all would send"
    return Section(
        name="traffic", title="Expert parallelism",
        text="Counted from the routing of the evaluated tokens, all MoE layers together, hidden states in bf16.",
        blocks=[
            Figure(
                name="traffic-bytes", title=title,
                chart=charts.bars(rows, x="ranks", y="bytes", x_title="ranks that share the experts", y_title="bytes per token", series="model", form=",.0f",
                                  order=[side for side in SIDES if any(row["model"] == side for row in rows)]),
                table=Table(
                    caption=title, head=("ranks", "model", "bytes per token", "imbalance, mean", "worst layer"),
                    rows=[(ranks, side, f"{one['bytes_per_token']:,.0f}", f"{one['imbalance']['mean']:.2f}", f"{one['imbalance']['worst']:.2f}")
                          for ranks, side, one in found],
                ),
            )
        ],
    )  # fmt: skip
