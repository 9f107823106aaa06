"""Writes a compressed folder and evaluates it from disk: one row of the quality tables. Options that those scripts share."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trimoe


def options(description: str | None, tokens: int) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=48)
    arguments.add_argument("--tokens", type=int, default=tokens)
    arguments.add_argument("--only", nargs="*", help="of the rows, those whose names contain one of these")
    arguments.add_argument("--json")
    return arguments


def row(given: argparse.Namespace, name: str, recipe: Any, changes: Sequence[str] = ()) -> dict[str, Any] | None:
    """Bytes and experts kept (shares), KL and perplexity per text, dropped layers; printed in a line. None if `--only` leaves it out."""
    if given.only and not any(word in name for word in given.only):
        return None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        made = trimoe.compress(given.model, recipe, out, changes=changes, calibration=given.calibration, samples=given.samples)
        report = trimoe.evaluate(out, against=given.model, text=given.text, stride=256, tokens=given.tokens)
    before, after = made.plan.before, made.plan.after
    found = {
        "model": given.model, "row": name, "bytes": after.file_bytes / before.file_bytes, "experts": after.experts / before.experts,
        "kl": report["mean_kl"], "kls": [text["kl"] for text in report["texts"]],
        "perplexity": [text["perplexity"] for text in report["texts"]],
        "gone": [index for index, decision in made.decisions.items() if decision.gone],
    }  # fmt: skip
    numbers = " ".join(f"{value:.2f}" for value in found["perplexity"])
    shares = f"bytes {found['bytes']:6.1%}  experts {found['experts']:6.1%}"
    print(f"{name:<42} {shares}  KL {found['kl']:.4f}  perplexity {numbers}  {found['gone'] or ''}", flush=True)
    return found
