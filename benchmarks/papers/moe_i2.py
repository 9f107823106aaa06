"""MoE-I2 (arXiv 2411.01016): expert pruning by search, low-rank factors, LoRA, each against what it is to improve on; and this package's choices.

    python benchmarks/papers/moe_i2.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt
    python benchmarks/papers/moe_i2.py --model deepseek-ai/DeepSeek-V2-Lite --like DeepSeek-V2-Lite --text wikitext2 --device cuda

Rows without "ours" and "relative" make the paper's choices (recipe moe-i2-paper): counts by raw importance, no cap on what a layer loses, no
protected experts, ranks by importance, plain SVD of gate, up and down each by itself, LoRA on the text. The paper does not print how importance
becomes counts: 1 / importance is a guess. "relative": importance divided by the norm of the layer's output, which is ours.
"""

from __future__ import annotations

from typing import Any

import comparison

SEARCH = {"genetic": {"population": 100, "generations": 50}}
FIELD = {"k": 3, "t": 3}
PAPER = {"normalize": "none", "layer_limit": None, "protect_super_experts": False, "cross_check": False}


def drop(ratio: float, counts: str = "importance", search: Any = SEARCH, field: Any = None, **other: Any) -> dict[str, Any]:
    """The paper's, where `other` does not say otherwise."""
    return {"expert_drop": {"ratio": ratio, "counts": counts, "search": search, "receptive_field": field, **PAPER, **other}}


def ours(ratio: float, field: Any = FIELD) -> dict[str, Any]:
    return {"expert_drop": {"ratio": ratio, "counts": "optimal", "search": SEARCH, "receptive_field": field}}


def ranks(rank: str, factors: str = "separate", whiten: str = "none") -> dict[str, Any]:
    return {"low_rank": {"ratio": 0.333, "rank": rank, "factors": factors, "whiten": whiten}}


def recipes(like: str, train: int) -> comparison.Recipes:
    steps: dict[str, list[dict[str, Any]]] = {
        "random 25%": [drop(0.25, "uniform", {"random": {"draws": 1}})],
        "gate 25%": [drop(0.25, "uniform", None, score="gate")],
        "greedy 25%": [drop(0.25, "uniform", "greedy")],
        "genetic 25%": [drop(0.25, "uniform")],
        "prune 25% without KT": [drop(0.25)],
        "prune 25%": [drop(0.25, field=FIELD)],
        "prune 25% without KT, relative": [drop(0.25, normalize="relative")],
        "prune 25%, relative": [drop(0.25, field=FIELD, normalize="relative")],
        "prune 25% without KT, ours": [ours(0.25, None)],
        "prune 25%, ours": [ours(0.25)],
        "genetic 50%": [drop(0.5, "uniform")],
        "prune 50% without KT": [drop(0.5)],
        "prune 50%": [drop(0.5, field=FIELD)],
        "prune 50% without KT, relative": [drop(0.5, normalize="relative")],
        "prune 50% without KT, ours": [ours(0.5, None)],
        "prune 50%, ours": [ours(0.5)],
        "one rank 33%": [ranks("uniform")],
        "ranks by importance 33%": [ranks("importance")],
        "one rank 33%, shared": [ranks("uniform", "shared")],
        "ranks by importance 33%, shared": [ranks("importance", "shared")],
        "ranks 33%, ours": [ranks("optimal", "shared", "input")],
        "moe-i2 50% without KT": [drop(0.25), ranks("importance")],
        "moe-i2 50%": [drop(0.25, field=FIELD), ranks("importance")],
        "moe-i2 50%, relative": [drop(0.25, field=FIELD, normalize="relative"), ranks("importance")],
        "moe-i2 50% without KT, ours": [ours(0.25, None), ranks("optimal", "shared", "input")],
        "moe-i2 50%, ours": [ours(0.25), ranks("optimal", "shared", "input")],
    }
    rows: comparison.Recipes = {name: {"steps": some} for name, some in steps.items()}
    if train:
        lora = {"method": "lora", "samples": train}
        rows |= {f"{name} + lora": {"steps": steps[name], "recover": lora} for name in ("prune 25%", "moe-i2 50%")}
        rows["moe-i2 50%, ours + logits"] = {"steps": steps["moe-i2 50%, ours"], "recover": {"method": "logits", "samples": train}}
    return rows


if __name__ == "__main__":
    comparison.main("moe_i2", __doc__, recipes, ["Mixtral-8x7B", "DeepSeek-V2-Lite"])
