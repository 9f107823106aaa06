"""Results as terminal tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimoe.show.format import counted, three
from trimoe.show.table import Fitting, Table, show


def evaluation(report: dict[str, Any]) -> None:
    """Texts, tasks, generation and expert-parallel traffic, on standard output; what was not measured is left out."""
    versus = report["against"] is not None
    if report["texts"]:
        _texts(report, versus)
    if "tasks" in report:
        _tasks(report, versus)
    if "generation" in report:
        _generation(report["generation"], versus)
    if "traffic" in report:
        _traffic(report["traffic"]["ways"], versus)


def _title(report: dict[str, Any], versus: bool) -> str:
    dtype = report.get("dtype", "float32")
    inside = f", in {dtype}, whose roundings are in the numbers" if dtype != "float32" else ""
    return f"{report['model']}" + (f" against {report['against']}" if versus else "") + inside


def _texts(report: dict[str, Any], versus: bool) -> None:
    """Perplexity, KL and agreement per text, with their 95 % intervals."""
    drawn = sorted({row["resampled"] for row in report["texts"] if row["intervals"]})
    columns = [("against_perplexity", "perplexity before", ".3f"), ("perplexity", "perplexity", ".3f"), ("kl", "KL, nats/token", ".4f"),
               ("agreement", "top-1 agreement", ".1%")]  # fmt: skip
    columns = columns if versus else columns[1:2]

    def made(intervals: bool) -> Table:
        rows = []
        for row in report["texts"]:
            values = row | ({"against_perplexity": row["against"]["perplexity"]} if versus else {})
            cells = [row["name"], f"{row['tokens']:,}"]
            for key, _, form in columns:
                ends = (row["intervals"] or {}).get(key) if intervals else None
                cells.append(f"{values[key]:{form}}" + (f"\n{_range(ends, form)}" if ends else ""))
            rows.append(cells)
        caption = f"windows of {report['length']} tokens, stride {report['stride']}"
        caption += f"; 95 % intervals: paired bootstrap over {' or '.join(drawn)}" if drawn and intervals else ""
        return Table(head=("text", "tokens", *(label for _, label, _ in columns)), rows=rows, title=_title(report, versus), caption=caption)

    show(Fitting([made(intervals=True), made(intervals=False)], wraps=True, gap=2))


def _range(ends: list[float], form: str) -> str:
    return f"{100 * ends[0]:.1f}-{ends[1]:{form}}" if form.endswith("%") else f"{ends[0]:{form}}-{ends[1]:{form}}"


def shown_tasks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for, and what averages are made of; tasks that a group sums up are in the JSON and on the page only."""
    summed = {row["task"] for row in rows if row.get("kind") == "group"}
    return [row for row in rows if row.get("part_of") not in summed]


def _tasks(report: dict[str, Any], versus: bool) -> None:
    """One line a task and metric. Tasks that a group sums up are in the JSON only; those that an average is made of are shown."""
    rows, settings = report["tasks"], report["task_settings"]
    shown = shown_tasks(rows)
    cut = {row["task"]: row["cut"] for row in shown if row["cut"] and row["kind"] != "average"}
    notes = [f"lm-eval {settings['lm_eval']}, value ± standard error"]
    if settings["limit"] is not None:
        notes.append(f"the first {settings['limit']} documents of each task")
    if versus:
        notes.append("differences are paired; * is more than two standard errors from 0")
    if cut:
        notes.append(
            f"requests longer than the context of {settings['context']} tokens lost their beginning: "
            + ", ".join(f"{name} {count:,}" for name, count in cut.items())
        )
    lines = []
    for row in shown:
        cells = [row["task"], f"{row['metric']}, {row['filter']}" if "filter" in row else row["metric"], f"{row['n']:,}"]
        if versus:
            sure = row["difference_stderr"] is not None and abs(row["difference"]) > 2 * row["difference_stderr"]
            cells += [_with_error(row["against"]["value"], row["against"]["stderr"]), _with_error(row["value"], row["stderr"])]
            cells.append(_with_error(row["difference"], row["difference_stderr"], "+") + ("*" if sure else " "))
        else:
            cells.append(_with_error(row["value"], row["stderr"]))
        lines.append(cells)
    show(Fitting([Table(
        head=("task", "metric", "n", *(["before", "after", "difference"] if versus else ["value"])), rows=lines, words=range(2),
        title=_title(report, versus), caption="; ".join(notes), parted=[at for at, row in enumerate(shown) if row["kind"] == "average"],
    )]))  # fmt: skip


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + (f" ±{error:.3f}" if error is not None else "")


def _generation(found: dict[str, Any], versus: bool) -> None:
    rows = []
    for key, label in (("against", "before"), ("model", "after")) if versus else (("model", ""),):
        for how in ("greedy", "sampled"):
            seen = found[key][how]
            share = f"{seen['distinct']:.1%}" if seen["distinct"] is not None else "-"
            rows.append((f"{label} {how}".strip(), f"{seen['loops']:.0%}", f"{seen['empty']:.0%}", share))
    show(Fitting([Table(
        head=("", "loops", "empty", "distinct"), rows=rows, title="Generation",
        caption=f"{found['prompts']} prompts of {found['prompt_tokens']} tokens, {found['new_tokens']} new ones; "
        "loops: ends in a repeated n-gram; distinct: share of 3-grams that differ",
    )]))  # fmt: skip


def _traffic(ways: dict[str, Any], versus: bool) -> None:
    """All-to-all traffic per expert-parallel degree; "-" where a layer has fewer experts than ranks."""
    columns = [("model", "")] if not versus else [("against", " before"), ("model", " after")]
    names = [f"{what}{when}" for what in ("bytes/token", "imbalance") for _, when in columns]
    seen = [(number, [models[model] for model, _ in columns]) for number, models in ways.items()]
    show(Fitting([Table(
        head=("ranks", *names[: len(columns)], *(["saving"] if versus else []), *names[len(columns) :]), title="Expert parallelism",
        rows=[(number, *traffic_cells(found)) for number, found in seen if any(found)],
        caption="bf16 hidden states that all-to-all dispatch and combine would send; imbalance: busiest rank / mean, mean / worst layer",
    )]))  # fmt: skip


def traffic_cells(found: list[dict[str, Any] | None]) -> list[str]:
    """Bytes per token of each model, what the last saves of the first where there are two, and the imbalances."""
    first, last = found[0], found[-1]
    cells = [f"{one['bytes_per_token']:,.0f}" if one else "-" for one in found]
    if len(found) > 1:
        cells.append(
            f"{1 - last['bytes_per_token'] / first['bytes_per_token']:z.1%}" if first and last and first["bytes_per_token"] else "-"
        )
    return cells + [f"{one['imbalance']['mean']:.2f} / {one['imbalance']['worst']:.2f}" if one else "-" for one in found]


def bench(report: dict[str, Any]) -> None:
    """Speed and memory of one model, or of two and their ratio, on standard output."""
    from trimoe.show.format import human

    models, ratio = report["models"], report["ratio"]
    names = [f"{model['model']}\n{', '.join([model['dtype'], *(model['backends'] or {})])}" for model in models]
    rows = []
    for name, label in (
        ("prefill_tokens_s", "prefill, tokens/s"),
        ("decode_tokens_s", "decode, tokens/s"),
        ("first_token_s", "first token, s"),
    ):
        spreads = [model[name] for model in models] + ([ratio[name]] if ratio else [])
        rows.append((label, *(f"{three(s['median'])} ({three(s['low'])}-{three(s['high'])})" for s in spreads)))
    rows.append(("loading, s", *(f"{model['load_s']:.1f}" for model in models), *([f"{ratio['load_s']:.2f}"] if ratio else [])))
    for name, label in (
        ("before_bytes", "memory before loading"),
        ("resident_bytes", "memory at the end"),
        ("peak_bytes", "peak, with mapped files"),
        ("disk_bytes", "on disk"),
    ):
        share = [f"{ratio[name]:.2f}" if name in ratio else ""] if ratio else []
        rows.append((label, *(human(model[name]) for model in models), *share))
    made = Table(
        head=("", *names, *(["ratio"] if ratio else [])), rows=rows,
        title=f"{report['batch']} x {report['prompt']} tokens, {report['generate']} new, {report['device']}, threads: {report['threads']}",
        caption=f"medians (quartiles) of {counted(report['rounds'], 'round')} in turns; {report['machine']}",
    )  # fmt: skip
    show(Fitting([made], fold=True))
