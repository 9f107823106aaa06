"""How much of what compression cost comes back by training: every method after moe-i2, moe-pruner and layer-drop, at an equal token budget.

    python benchmarks/quality_recovery.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

Trained on the calibration texts; evaluated on `--text`. "Recovered" is the share of the lost perplexity (mean of logarithms over the texts) and of
the KL that is won back; more than 100 % of the perplexity means better than the original on that text.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from alternate import write_json

import trimoe

COMPRESSED = {
    "moe-i2": ("moe-i2", []),
    "moe-pruner": ("moe-pruner", []),
    "layer-drop": ("layer-drop", []),
}
METHODS: dict[str, dict[str, Any]] = {
    "logits": {"method": "logits"},
    "logits, all weights": {"method": "logits", "train": "full"},
    "lora": {"method": "lora"},
    "router": {"method": "router"},
    "experts": {"method": "experts"},
    "experts, in memory": {"method": "experts", "stream": False},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--tokens", type=int, default=4096, help="evaluated, of each text")
    arguments.add_argument("--samples", type=int, default=48, help="for compressing")
    arguments.add_argument("--train", type=int, default=1024, help="sequences of 256 tokens to train on")
    arguments.add_argument("--epochs", type=int, default=1)
    arguments.add_argument("--only", nargs="*", help="of the rows, those whose names contain one of these")
    arguments.add_argument("--set", nargs="*", default=[], help="fields of recover, e.g. rate=0.001")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, (recipe, changes) in COMPRESSED.items():
            wanted = {
                method: spec for method, spec in METHODS.items() if not given.only or any(w in f"{name} + {method}" for w in given.only)
            }
            if not wanted:
                continue
            folder = Path(scratch, name)
            trimoe.compress(given.model, recipe, folder, changes=changes, calibration=given.calibration, samples=given.samples)
            base = _row(given, name, folder, None, 0.0)
            rows.append(base)
            for method, spec in wanted.items():
                body = {"data": given.calibration, "samples": given.train, "length": 256, "epochs": given.epochs, **spec}
                body |= {
                    key: float(value) if "." in value else int(value) for key, _, value in (change.partition("=") for change in given.set)
                }
                start = time.monotonic()
                try:
                    done = trimoe.recover(folder, Path(scratch, f"{name}-{method}"), body)
                except trimoe.UserError as reason:
                    print(f"{name} + {method}: {reason}", flush=True)
                    continue
                rows.append(_row(given, f"{name} + {method}", done.out, base, time.monotonic() - start))
    write_json(given.json, rows)


def _row(given: argparse.Namespace, name: str, folder: Path, base: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
    report = trimoe.evaluate(folder, against=given.model, text=given.text, stride=256, tokens=given.tokens)
    texts = report["texts"]
    lost = sum(math.log(text["perplexity"] / text["against"]["perplexity"]) for text in texts) / len(texts)
    row = {"row": name, "kl": report["mean_kl"], "lost": lost, "perplexity": [text["perplexity"] for text in texts], "seconds": seconds}
    back = ""
    if base is not None:
        row |= {"perplexity_recovered": 1 - lost / base["lost"], "kl_recovered": 1 - row["kl"] / base["kl"]}
        back = f"recovered: perplexity {row['perplexity_recovered']:.0%}, KL {row['kl_recovered']:.0%}"
    numbers = " ".join(f"{value:.2f}" for value in row["perplexity"])
    print(f"{name:<34} KL {row['kl']:.4f}  lost {lost:+.4f}  perplexity {numbers}  {seconds:4.0f} s  {back}", flush=True)
    return row


if __name__ == "__main__":
    main()
