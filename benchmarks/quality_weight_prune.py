"""Zeros inside experts: each score, pattern and scope at one half, held-out perplexity and KL.

    python benchmarks/quality_weight_prune.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

Every result is really written and evaluated from disk. KL(original || compressed) in nats per token, mean over texts; one shot.
"""

from __future__ import annotations

from typing import Any

import made_and_measured
from alternate import write_json

SCORES = ("moe_pruner", "wanda", "sparsegpt", "magnitude")


def rows() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for score in SCORES:
        table[f"{score} 50%"] = {"score": score, "ratio": 0.5}
    for score in SCORES:
        for pattern in ("4:8", "2:4"):
            table[f"{score} {pattern}"] = {"score": score, "pattern": pattern}
    for score in ("moe_pruner", "wanda", "magnitude"):
        table[f"{score} 50%, per layer"] = {"score": score, "ratio": 0.5, "compare": "layer"}
    for scope in ("moe", "all-linear"):
        for score in SCORES:
            table[f"{score} 50%, {scope}"] = {"score": score, "ratio": 0.5, "scope": scope}
    for ratio in (0.3, 0.7):
        for score in SCORES:
            table[f"{score} {ratio:.0%}"] = {"score": score, "ratio": ratio}
    table["moe_pruner 50%, bitmask"] = {"ratio": 0.5, "form": "bitmask"}
    return table


def main() -> None:
    given = made_and_measured.options(__doc__, tokens=4096).parse_args()
    found = [made_and_measured.row(given, name, {"steps": [{"weight_prune": step}]}) for name, step in rows().items()]
    write_json(given.json, [row for row in found if row is not None])


if __name__ == "__main__":
    main()
