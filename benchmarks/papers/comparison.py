"""A paper's comparison on a model of your own: every method and baseline compressed, evaluated, and set beside the paper's numbers.

What the scripts share. The papers' tables are YAML files beside them, each with where it was read; rows have the same names there and in the
scripts. Accuracies of the papers and KL here are different scales: what is compared is the order of the rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import trimoe
from trimoe.cli.options import names_of
from trimoe.evaluate.cache import default_folder
from trimoe.progress import Reporter
from trimoe.sweep.rows import Row

HERE = Path(__file__).parent
Recipes = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """Of two rows the one that the paper (or a claim) puts first, and whether it is first here: None where one of them was not run."""

    better: str
    worse: str
    holds: bool | None


def paper(name: str) -> dict[str, Any]:
    """The YAML file of a paper's tables and claims."""
    return yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))


def pairs(table: Mapping[str, Any], ours: Mapping[str, float]) -> list[Pair]:
    """All pairs of a table's rows whose numbers differ, ordered as the paper orders them; `ours` is lower where a row is better."""
    column = table["columns"].index(table["judged"])
    sign = 1 if table["better"] == "lower" else -1
    numbers = {name: sign * row[column] for name, row in table["rows"].items()}
    found = []
    for a, b in itertools.combinations(sorted(numbers, key=lambda name: numbers[name]), 2):
        if numbers[a] != numbers[b]:
            found.append(Pair(a, b, ours[a] < ours[b] if a in ours and b in ours else None))
    return found


def kl_of(rows: Mapping[str, Row]) -> dict[str, float]:
    return {"dense": 0.0, **{name: row.kl for name, row in rows.items()}}


def perplexity_of(rows: Mapping[str, Row]) -> dict[str, float]:
    dense = {"dense": next(iter(rows.values())).perplexity_before} if rows else {}
    return {**dense, **{name: row.perplexity for name, row in rows.items()}}


def error_of(rows: Mapping[str, Row]) -> dict[str, float]:
    """1 - mean accuracy of the tasks, so that lower is better as it is for the others; nothing where tasks were not run."""
    found = {name: 1 - row.accuracy for name, row in rows.items() if row.accuracy is not None}
    before = [row.accuracy_before for row in rows.values() if row.accuracy_before is not None]
    return ({"dense": 1 - before[0]} if before else {}) | found


MEASURES: dict[str, Callable[[Mapping[str, Row]], dict[str, float]]] = {"kl": kl_of, "perplexity": perplexity_of, "accuracy": error_of}


def claim(given: Mapping[str, Any], rows: Mapping[str, Row]) -> tuple[Pair, dict[str, float]]:
    """Whether `better` is below `worse`, and the numbers of both; with `since`, what each has won since that row (negative) is compared."""
    ours = MEASURES[given.get("by", "kl")](rows)
    numbers = {}
    for side in ("better", "worse"):
        name, since = given[side], given.get("since", {}).get(side)
        if name in ours and (since is None or since in ours):
            numbers[name] = ours[name] - (ours[since] if since is not None else 0.0)
    a, b = given["better"], given["worse"]
    return Pair(a, b, numbers[a] < numbers[b] if len(numbers) == 2 else None), numbers


def options(description: str | None, like: list[str]) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--model", default="builtin:mini-mixtral", help="a folder, a hub id such as mistralai/Mixtral-8x7B-v0.1, or builtin:NAME"
    )
    arguments.add_argument("--like", default=like[0], choices=like, help="the paper's model whose settings and numbers are taken")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=128)
    arguments.add_argument(
        "--length",
        type=int,
        default=2048,
        help="tokens in a sample, and in an evaluated window (they do not overlap)",
    )
    arguments.add_argument("--tokens", type=int, default=32768, help="evaluated, of each text")
    arguments.add_argument("--tasks", default="", help="lm-eval tasks, comma between: moe-i2-nine are those of the papers")
    arguments.add_argument("--limit", type=int, help="documents of each task, at most")
    arguments.add_argument("--include", nargs="*", default=[], help="folders of lm-eval task files (benchmarks/eval_offline.py makes one)")
    arguments.add_argument("--train", type=int, default=1000, help="samples to train on, in rows that train; 0 leaves them out")
    arguments.add_argument("--only", nargs="*", help="of the rows, those whose names contain one of these")
    arguments.add_argument("--out", default="papers", help="where the sweep lies; run again, it goes on")
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32")
    return arguments


def folder(name: str, model: str) -> str:
    return f"{name}-{model.replace(':', '-').strip('/').replace('/', '-')}"


def run(given: argparse.Namespace, name: str, recipes: Recipes, own_calibration: bool = False) -> dict[str, Row]:
    """Every row compressed and evaluated, by its name; on the recipes' own calibration text, or on the one that is given."""
    wanted = {row: body for row, body in recipes.items() if not given.only or any(word in row for word in given.only)}
    first = {json.dumps(body): row for row, body in reversed(wanted.items())}  # rows that are the same recipe are made once
    alike = {row: first[json.dumps(body)] for row, body in wanted.items()}
    same = {} if own_calibration else {"calibration": given.calibration, "samples": given.samples, "length": given.length}
    found = trimoe.sweep(
        given.model, {row: wanted[row] for row in first.values()}, Path(given.out, folder(name, given.model)), **same, text=given.text,
        tokens=given.tokens, window=given.length, stride=given.length, tasks=names_of(given.tasks), limit=given.limit,
        include=given.include, cache=default_folder(), device=given.device, dtype=given.dtype, reporter=Reporter("auto"),
    )  # fmt: skip
    made = dict(zip(first.values(), found.rows, strict=True))
    return {row: made[alike[row]] for row in wanted}


def show(about: Mapping[str, Any], rows: Mapping[str, Row], like: str) -> None:
    """The paper's numbers beside ours, and where the order is another."""
    print(f"\n{about['title']} (arXiv {about['arxiv']})\nThe paper's numbers were read in: {about['read']}.")
    for row, stands in about.get("stand_ins", {}).items():
        print(f"Here {row!r} stands in for {stands}.")
    for table in about["tables"]:
        if table["model"] == like and not table.get("sizes"):
            _table(table, rows)
    print("\nEverything that was run:")
    for name, row in sorted(rows.items(), key=lambda item: item[1].kl):
        print(
            f"  {name:<32} {row.share:6.1%} of the bytes  KL {row.kl:.4f}  perplexity {row.perplexity_before:.2f} -> {row.perplexity:.2f}"
            + (f"  acc {row.accuracy_before:.3f} -> {row.accuracy:.3f}" if row.accuracy is not None else "")
        )
    print("\nClaims:")
    for given in about["claims"]:
        pair, ours = claim(given, rows)
        numbers = f" ({_short(ours[pair.better])} and {_short(ours[pair.worse])})" if pair.holds is not None else ""
        verdict = {True: "holds", False: "DOES NOT HOLD", None: "was not run"}[pair.holds]
        print(f"  {verdict}: {given['says']}: {pair.better} before {pair.worse}{numbers}")


def _table(table: Mapping[str, Any], rows: Mapping[str, Row]) -> None:
    print(f"\nTable {table['number']}, {table['model']}: {table['judged']} in the paper, beside KL and perplexity here")
    column, sign = table["columns"].index(table["judged"]), 1 if table["better"] == "lower" else -1
    kl, perplexity, error = kl_of(rows), perplexity_of(rows), error_of(rows)
    for name, numbers in sorted(table["rows"].items(), key=lambda item: sign * item[1][column]):
        ours = f"KL {_short(kl[name])}  perplexity {perplexity[name]:.2f}" if name in kl and name in perplexity else "not run"
        ours += f"  acc {1 - error[name]:.3f}" if name in error else ""
        print(f"  {name:<32} {numbers[column]:8.2f}   {ours}")
    for measure, values in (("KL", kl), ("perplexity", perplexity), *([("accuracy", error)] if error else [])):
        known = [pair for pair in pairs(table, values) if pair.holds is not None]
        wrong = [f"{pair.worse} before {pair.better}" for pair in known if not pair.holds]
        print(
            f"  {len(known) - len(wrong)} of {len(known)} pairs in the paper's order by {measure}"
            + (f"; here {', '.join(wrong)}" if wrong else "")
        )


def _short(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}" if math.isfinite(value) else "-"


def main(name: str, description: str | None, recipes: Callable[[str, int], Recipes], like: list[str]) -> None:
    """What every script does: `recipes` makes the rows for a paper's model and a number of training samples."""
    given = options(description, like).parse_args()
    show(paper(name), run(given, name, recipes(given.like, given.train)), given.like)
