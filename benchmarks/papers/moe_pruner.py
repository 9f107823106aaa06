"""MoE-Pruner (arXiv 2410.12013), tables 2 to 4: zeros inside experts by MoE-Pruner, Wanda, SparseGPT and magnitude, and expert-wise distillation.

    python benchmarks/papers/moe_pruner.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt
    python benchmarks/papers/moe_pruner.py --model mistralai/Mixtral-8x7B-v0.1 --calibration allenai/c4 --text wikitext2 --device cuda --dtype bfloat16

The paper: 128 samples of 2,048 tokens of C4; distillation with the next-token loss, 1,000 samples, 3 epochs, rate 2e-5, cosine, masks kept
(recipe moe-pruner-paper). "ours" is the same at this package's rate.
"""

from __future__ import annotations

import comparison

SCORES = ("moe_pruner", "wanda", "sparsegpt", "magnitude")


def recipes(like: str, train: int) -> comparison.Recipes:
    rows: comparison.Recipes = {}
    for score in SCORES:
        rows[f"{score} 50%"] = {"steps": [{"weight_prune": {"score": score, "ratio": 0.5}}]}
        rows[f"{score} 2:4"] = {"steps": [{"weight_prune": {"score": score, "pattern": "2:4"}}]}
        rows[f"{score} 70%"] = {"steps": [{"weight_prune": {"score": score, "ratio": 0.7}}]}
    if train:
        distilled = {"method": "experts", "stream": False, "samples": train, "length": 2048, "epochs": 3}
        rows["moe_pruner 50% distilled"] = {**rows["moe_pruner 50%"], "recover": {**distilled, "rate": 2e-5}}
        rows["moe_pruner 50% distilled, ours"] = {**rows["moe_pruner 50%"], "recover": distilled}
    return rows


if __name__ == "__main__":
    comparison.main("moe_pruner", __doc__, recipes, ["Mixtral-8x7B", "Mixtral-8x7B-Instruct", "Mixtral-8x22B", "Mixtral-8x22B-Instruct"])
