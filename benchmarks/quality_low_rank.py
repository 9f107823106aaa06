"""Low-rank experts: held-out KL and perplexity of plain and whitened factors and of three ways of giving out ranks, by share removed;
and the moe-i2 recipe with its own and with the paper's choices. Every result is really written and evaluated from disk.

    python benchmarks/quality_low_rank.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

KL(original || compressed) in nats per token, mean over texts; one shot, no recovery.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import trimoe

MOE_I2 = "moe-i2"
PAPER = ["steps.0.counts=importance", "steps.1.rank=importance"]


def recipes(ratios: list[float]) -> list[tuple[str, Any, list[str]]]:
    rows: list[tuple[str, Any, list[str]]] = []
    for ratio in ratios:
        for whiten in ("none", "input"):
            for rank in ("uniform", "importance", "optimal"):
                step = {"low_rank": {"ratio": ratio, "rank": rank, "whiten": whiten}}
                rows.append((f"{ratio:.0%} gone, {rank}, whiten {whiten}", {"steps": [step]}, []))
    rows.append(("moe-i2", MOE_I2, []))
    rows.append(("moe-i2, paper's counts and ranks", MOE_I2, PAPER))
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=48)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.4, 0.6])
    arguments.add_argument("--json")
    given = arguments.parse_args()
    results = []
    for name, recipe, changes in recipes(given.ratios):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            made = trimoe.compress(given.model, recipe, out, changes=changes, calibration=given.calibration, samples=given.samples)
            report = trimoe.evaluate(out, against=given.model, text=given.text, stride=256, tokens=given.tokens)
        share = made.plan.after.experts / made.plan.before.experts
        perplexity = [row["perplexity"] for row in report["texts"]]
        results.append({"model": given.model, "recipe": name, "experts_kept": share, "kl": report["mean_kl"], "perplexity": perplexity})
        numbers = " ".join(f"{value:.2f}" for value in perplexity)
        print(f"{name:<40} kept {share:6.1%}  KL {report['mean_kl']:.4f}  perplexity {numbers}", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
