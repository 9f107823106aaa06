"""Results as terminal tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def evaluation(report: dict[str, Any]) -> None:
    """Perplexity, KL and agreement per text, on standard output."""
    versus = report["against"] is not None
    table = Table(
        title=f"{report['model']}" + (f" against {report['against']}" if versus else ""),
        caption=f"windows of {report['length']} tokens, stride {report['stride']}",
    )
    table.add_column("text")
    for name in (
        "tokens",
        *(["perplexity before"] if versus else []),
        "perplexity",
        *(["KL, nats/token", "top-1 agreement"] if versus else []),
    ):
        table.add_column(name, justify="right")
    for row in report["texts"]:
        cells = [row["name"], f"{row['tokens']:,}"]
        cells += [f"{row['against']['perplexity']:.3f}"] if versus else []
        cells += [f"{row['perplexity']:.3f}"]
        cells += [f"{row['kl']:.4f}", f"{row['agreement']:.1%}"] if versus else []
        table.add_row(*cells)
    Console().print(table)
    _traffic(report["traffic"]["ways"], versus)


def _traffic(ways: dict[str, Any], versus: bool) -> None:
    """All-to-all traffic per expert-parallel degree; "-" where a layer has fewer experts than ranks."""
    table = Table(
        title="Expert parallelism",
        caption="bf16 hidden states that all-to-all dispatch and combine would send; imbalance: busiest rank / mean, mean / worst layer",
    )
    columns = [("model", "")] if not versus else [("against", " before"), ("model", " after")]
    table.add_column("ranks")
    for name in (
        *(f"bytes/token{when}" for _, when in columns),
        *(["saving"] if versus else []),
        *(f"imbalance{when}" for _, when in columns),
    ):
        table.add_column(name, justify="right")
    for number, seen in ways.items():
        found = [seen[model] for model, _ in columns]
        if any(found):
            table.add_row(number, *traffic_cells(found))
    Console().print(table)


def traffic_cells(found: list[dict[str, Any] | None]) -> list[str]:
    """Bytes per token of each model, what the last saves of the first where there are two, and the imbalances."""
    first, last = found[0], found[-1]
    cells = [f"{one['bytes_per_token']:,.0f}" if one else "-" for one in found]
    if len(found) > 1:
        cells.append(
            f"{1 - last['bytes_per_token'] / first['bytes_per_token']:.1%}" if first and last and first["bytes_per_token"] else "-"
        )
    return cells + [f"{one['imbalance']['mean']:.2f} / {one['imbalance']['worst']:.2f}" if one else "-" for one in found]


def bench(report: dict[str, Any]) -> None:
    """Speed and memory of one model, or of two and their ratio, on standard output."""
    from trimoe.plan import human

    models, ratio = report["models"], report["ratio"]
    table = Table(
        title=f"{report['batch']} x {report['prompt']} tokens, {report['generate']} new, {report['device']}, threads: {report['threads']}",
        caption=f"medians (quartiles) of {report['rounds']} rounds in turns; {report['machine']}",
    )
    table.add_column("")
    for model in models:
        how = [model["dtype"], *(model["backends"] or {})]
        table.add_column(f"{model['model']}\n{', '.join(how)}", justify="right", overflow="fold")
    if ratio:
        table.add_column("ratio", justify="right")
    for name, label in (
        ("prefill_tokens_s", "prefill, tokens/s"),
        ("decode_tokens_s", "decode, tokens/s"),
        ("first_token_s", "first token, s"),
    ):
        spreads = [model[name] for model in models] + ([ratio[name]] if ratio else [])
        table.add_row(label, *(f"{_short(s['median'])} ({_short(s['low'])}-{_short(s['high'])})" for s in spreads))
    table.add_row("loading, s", *(f"{model['load_s']:.1f}" for model in models), *([f"{ratio['load_s']:.2f}"] if ratio else []))
    for name, label in (
        ("before_bytes", "memory before loading"),
        ("resident_bytes", "memory at the end"),
        ("peak_bytes", "peak, with mapped files"),
        ("disk_bytes", "on disk"),
    ):
        share = [f"{ratio[name]:.2f}" if name in ratio else ""] if ratio else []
        table.add_row(label, *(human(model[name]) for model in models), *share)
    Console().print(table)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
