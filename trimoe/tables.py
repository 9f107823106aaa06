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
