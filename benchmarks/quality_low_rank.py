"""Low-rank experts: held-out KL and perplexity of plain and whitened factors and of three ways of giving out ranks, by share removed;
and the moe-i2 recipe with its own and with the paper's choices. Every result is really written and evaluated from disk.

    python benchmarks/quality_low_rank.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

KL(original || compressed) in nats per token, mean over texts; one shot, no recovery.
"""

from __future__ import annotations

from typing import Any

import made_and_measured
from alternate import write_json

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
    arguments = made_and_measured.options(__doc__, tokens=8192)
    arguments.add_argument("--ratios", nargs="*", type=float, default=[0.2, 0.4, 0.6])
    given = arguments.parse_args()
    found = [made_and_measured.row(given, *row) for row in recipes(given.ratios)]
    write_json(given.json, [row for row in found if row is not None])


if __name__ == "__main__":
    main()
