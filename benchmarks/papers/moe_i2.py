"""MoE-I2 (arXiv 2411.01016): expert pruning by search, low-rank factors, LoRA, each against what it is to improve on; and this package's choices.

    python benchmarks/papers/moe_i2.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt
    python benchmarks/papers/moe_i2.py --model deepseek-ai/DeepSeek-V2-Lite --like DeepSeek-V2-Lite --text wikitext2 --device cuda

Rows without "ours" make the paper's choices: counts and ranks by importance, plain SVD.
"""

from __future__ import annotations

from typing import Any

import comparison

SEARCH = {"genetic": {"population": 100, "generations": 50}}
FIELD = {"k": 3, "t": 3}


def drop(ratio: float, counts: str = "importance", search: Any = SEARCH, field: Any = None) -> dict[str, Any]:
    return {"expert_drop": {"ratio": ratio, "counts": counts, "search": search, "receptive_field": field}}


def ranks(rank: str, whiten: str = "none") -> dict[str, Any]:
    return {"low_rank": {"ratio": 0.333, "rank": rank, "whiten": whiten}}


def recipes(like: str, train: int) -> comparison.Recipes:
    steps: dict[str, list[dict[str, Any]]] = {
        "random 25%": [drop(0.25, "uniform", {"random": {"draws": 1}})],
        "gate 25%": [{"expert_drop": {"ratio": 0.25, "score": "gate", "counts": "uniform"}}],
        "greedy 25%": [drop(0.25, "uniform", "greedy")],
        "genetic 25%": [drop(0.25, "uniform")],
        "prune 25% without KT": [drop(0.25)],
        "prune 25%": [drop(0.25, field=FIELD)],
        "prune 25%, ours": [drop(0.25, "optimal", field=FIELD)],
        "genetic 50%": [drop(0.5, "uniform")],
        "one rank 33%": [ranks("uniform")],
        "ranks by importance 33%": [ranks("importance")],
        "moe-i2 50%": [drop(0.25, field=FIELD), ranks("importance")],
        "moe-i2 50%, ours": [drop(0.25, "optimal", field=FIELD), ranks("optimal", "input")],
    }
    rows: comparison.Recipes = {name: {"steps": some} for name, some in steps.items()}
    if train:
        lora = {"method": "lora", "samples": train}
        rows |= {f"{name} + lora": {"steps": steps[name], "recover": lora} for name in ("prune 25%", "moe-i2 50%")}
    return rows


if __name__ == "__main__":
    comparison.main("moe_i2", __doc__, recipes, ["Mixtral-8x7B", "DeepSeek-V2-Lite"])
