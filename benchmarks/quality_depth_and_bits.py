"""Dropping experts, MoE sub-layers and decoder layers, alone and with 4-bit experts: bytes, held-out perplexity and KL, by share removed.

    python benchmarks/quality_depth_and_bits.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

Every result is really written and evaluated from disk. KL(original || compressed) in nats per token, mean over texts; one shot.
"""

from __future__ import annotations

from typing import Any

import made_and_measured
from alternate import write_json

INT4 = {"quantize": {"bits": 4}}


def rows() -> dict[str, list[dict[str, Any]]]:
    drops: dict[str, dict[str, Any]] = {}
    for share in (0.125, 0.25, 0.5):
        drops[f"expert drop {share:.1%}, gate"] = {"expert_drop": {"ratio": share, "score": "gate", "counts": "uniform"}}
        drops[f"expert drop {share:.1%}, search"] = {"expert_drop": {"ratio": share, "counts": "uniform", "search": "greedy"}}
        drops[f"expert drop {share:.1%}, gate, global"] = {"expert_drop": {"ratio": share, "score": "gate", "counts": "global"}}
        drops[f"layer drop {share:.1%}"] = {"layer_drop": {"ratio": share}}
        drops[f"layer drop {share:.1%}, metric output"] = {"layer_drop": {"ratio": share, "metric": "output"}}
        drops[f"layer drop {share:.1%}, rerank kl"] = {"layer_drop": {"ratio": share, "rerank": "kl"}}
        drops[f"block drop {share:.1%}"] = {"block_drop": {"ratio": share}}
        drops[f"block drop {share:.1%}, consecutive"] = {"block_drop": {"ratio": share, "choose": "consecutive"}}
        drops[f"block drop {share:.1%}, rerank kl"] = {"block_drop": {"ratio": share, "rerank": "kl"}}
    table = {"int8 round": [{"quantize": {"bits": 8, "method": "round"}}]}
    table |= {f"int4 {method}": [{"quantize": {"bits": 4, "method": method}}] for method in ("round", "awq", "gptq")}
    for name, step in drops.items():
        table[name] = [step]
        if not any(word in name for word in ("global", "output", "consecutive")):
            table[name + " + int4"] = [step, INT4]
    table["4 sub-layers, mixed, rerank kl"] = [{"layer_drop": {"count": 4, "blocks": True, "rerank": "kl"}}]
    return table


def main() -> None:
    given = made_and_measured.options(__doc__, tokens=4096).parse_args()
    found = [made_and_measured.row(given, name, {"steps": steps}) for name, steps in rows().items()]
    write_json(given.json, [row for row in found if row is not None])


if __name__ == "__main__":
    main()
