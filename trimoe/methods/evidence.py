"""On how much text decisions rest, in words: from what trimoe.json says under `measured_on` of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimoe.show.format import runs

WORST = 3  # layers that are told apart
NAMES = {
    "statistics": "statistics", "search": "search", "sensitivity": "sensitivity of the layers", "receptive_field": "reception field",
    "rerank": "KL without each part",
}  # fmt: skip
HEAD = ("decision", "samples", "tokens", "of these")


def fewer(search: Mapping[str, Any]) -> str:
    """The end of a sentence: where experts were chosen by too few search tokens, by how many at the least; nothing where all have enough."""
    found = {int(index): row for index, row in (search.get("fewer") or {}).items()}
    if not found:
        return ""
    worst = sorted(sorted(found, key=lambda index: -found[index]["experts"])[:WORST])
    said = "; ".join(f"layer {index}: {found[index]['experts']}, down to {found[index]['least']}" for index in worst)
    more = "" if len(found) <= WORST else f"; in all in layers {runs(sorted(found))}"
    return f"; {sum(row['experts'] for row in found.values()):,} by fewer than {search['enough']} ({said}{more})"


def rows(measured_on: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """A row of HEAD for everything that was measured."""
    made = []
    for name, shown in NAMES.items():
        if (found := measured_on.get(name)) is None:
            continue
        domains = found.get("domains") or {}
        words = ", ".join(f"{count} of {domain}" for domain, count in domains.items())
        if name == "search":
            words = f"an expert: {found['routed_median']:,} (median), {found['routed_least']:,} at least{fewer(found)}"
            if found["tokens"] < found.get("wanted", 0):
                words += f"; search_memory holds no more of the {found['wanted']:,} wanted"
        samples = found.get("samples")
        made.append((shown, "-" if samples is None else f"{samples:,}", f"{found['tokens']:,}", words or "-"))
    return made


def sentence(measured_on: Mapping[str, Any]) -> str:
    """The same in one line."""
    return "; ".join(
        f"{name} on {tokens} tokens" + (f" ({words})" if name == NAMES["search"] else f" ({samples} samples)")
        for name, samples, tokens, words in rows(measured_on)
    )
