"""The holistic study (arXiv 2406.02500), tables 2, 3 and 7: Expert, Layer and Block Drop, alone and with experts in 4 bits.

    python benchmarks/papers/holistic.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt
    python benchmarks/papers/holistic.py --model deepseek-ai/deepseek-moe-16b-base --like DeepSeek-MoE-16B --text wikitext2 --device cuda

The paper: 128 samples of C4, AWQ. Here, too, layers are ranked by similarity alone (`rerank: none`) and experts by mean routing weight.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import comparison

INT4 = {"quantize": {"bits": 4, "method": "awq"}}


def recipes(like: str, train: int) -> comparison.Recipes:
    shares = {name: float(Fraction(share)) for name, share in comparison.paper("holistic")["drops"][like].items()}
    drops: dict[str, dict[str, Any]] = {
        "E": {"expert_drop": {"ratio": shares["E"], "score": "gate", "counts": "uniform"}},
        "L": {"layer_drop": {"ratio": shares["L"]}},
        "B": {"block_drop": {"ratio": shares["B"]}},
    }
    steps: dict[str, list[dict[str, Any]]] = {"+4": [INT4]}
    for name, step in drops.items():
        steps |= {name: [step], f"{name}+4": [step, INT4]}
    steps["E global"] = [{"expert_drop": {"ratio": shares["E"], "score": "gate", "counts": "global"}}]
    steps["E 1/2"] = [{"expert_drop": {"ratio": 0.5, "score": "gate", "counts": "uniform"}}]
    steps["L by output"] = [{"layer_drop": {"ratio": shares["L"], "metric": "output"}}]
    for name, share in (("1/8", 0.125), ("1/4", 0.25)):
        steps |= {f"L {name}": [{"layer_drop": {"ratio": share}}], f"B {name}": [{"block_drop": {"ratio": share}}]}
    steps["L 1/2"] = [{"layer_drop": {"ratio": 0.5}}]
    rows: comparison.Recipes = {name: {"steps": copy.deepcopy(some)} for name, some in steps.items()}
    if train:
        finetuned = {"method": "logits", "samples": train}
        rows |= {f"{name} finetuned": {"steps": [step], "recover": finetuned} for name, step in drops.items()}
    return rows


if __name__ == "__main__":
    comparison.main("holistic", __doc__, recipes, ["Mixtral-8x7B", "DeepSeek-MoE-16B"])
