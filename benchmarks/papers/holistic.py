"""The holistic study (arXiv 2406.02500), tables 2, 3 and 7: Expert, Layer and Block Drop, alone and with experts in 4 bits.

    python benchmarks/papers/holistic.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt
    python benchmarks/papers/holistic.py --model deepseek-ai/deepseek-moe-16b-base --like DeepSeek-MoE-16B --text wikitext2 --device cuda

The paper: 128 samples of C4, AWQ. Here, too, layers are ranked by similarity alone (`rerank: none`), experts by mean routing weight with none
protected and no cap on what a layer loses, and finetuning is of all weights on text (`sft`). Rates and epochs are those of its authors' scripts
(3 epochs of instructions at 2e-5 for Mixtral, there with adapters because it is too large, and at 8e-6 for DeepSeek). "ours" distils the
original's distributions into adapters.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import comparison

RATES = {"Mixtral-8x7B": 2e-5, "DeepSeek-MoE-16B": 8e-6}
SCORED = {"score": "gate", "layer_limit": None, "protect_super_experts": False, "cross_check": False}
INT4 = {"quantize": {"bits": 4, "method": "awq"}}


def recipes(like: str, train: int) -> comparison.Recipes:
    shares = {name: float(Fraction(share)) for name, share in comparison.paper("holistic")["drops"][like].items()}
    drops: dict[str, dict[str, Any]] = {
        "E": {"expert_drop": {"ratio": shares["E"], "counts": "uniform", **SCORED}},
        "L": {"layer_drop": {"ratio": shares["L"]}},
        "B": {"block_drop": {"ratio": shares["B"]}},
    }
    steps: dict[str, list[dict[str, Any]]] = {"+4": [INT4]}
    for name, step in drops.items():
        steps |= {name: [step], f"{name}+4": [step, INT4]}
    steps["E global"] = [{"expert_drop": {"ratio": shares["E"], "counts": "global", **SCORED}}]
    steps["E 1/2"] = [{"expert_drop": {"ratio": 0.5, "counts": "uniform", **SCORED}}]
    steps["L by output"] = [{"layer_drop": {"ratio": shares["L"], "metric": "output"}}]
    for name, share in (("1/8", 0.125), ("1/4", 0.25)):
        steps |= {f"L {name}": [{"layer_drop": {"ratio": share}}], f"B {name}": [{"block_drop": {"ratio": share}}]}
    steps["L 1/2"] = [{"layer_drop": {"ratio": 0.5}}]
    rows: comparison.Recipes = {name: {"steps": copy.deepcopy(some)} for name, some in steps.items()}
    if train:
        finetuned = {
            "finetuned": {"method": "sft", "samples": train, "epochs": 3, "rate": RATES[like]},
            "finetuned, ours": {"method": "logits", "samples": train},
        }
        rows |= {f"{name} {how}": {"steps": [step], "recover": some} for name, step in drops.items() for how, some in finetuned.items()}
    return rows


if __name__ == "__main__":
    comparison.main("holistic", __doc__, recipes, ["Mixtral-8x7B", "DeepSeek-MoE-16B"])
