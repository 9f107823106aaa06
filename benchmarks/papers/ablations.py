"""What the papers leave open, on a model of your own. One subcommand a question; each but `search` is a sweep, so that it goes on where it was.

    python benchmarks/papers/ablations.py QUESTION --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

counts      the same count of experts in every layer, counts by importance, by measured loss, by score over all layers
search      genetic against exhaustive, greedy and random, at equal numbers of evaluated sets
threshold   Layer and Block Drop by similarity threshold, from none to as many as may go
mixed       so many sub-layers: MoE sub-layers, decoder layers, or whichever costs less
recovery    KL and perplexity by number of training steps
size        by number of calibration samples
domain      calibrated on each text alone, evaluated on each
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import comparison

from trimoe.calibration.gather import statistics
from trimoe.calibration.statistics import Stats
from trimoe.methods.depth import candidates as parts
from trimoe.methods.depth.candidates import left
from trimoe.methods.expert_drop import search
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.text.samples import calibrate

Recipes = comparison.Recipes


def one(step: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"steps": [step], **more}


def counts() -> Recipes:
    return {
        f"{ratio:.0%} {how}": one({"expert_drop": {"ratio": ratio, "counts": how, "search": "greedy"}})
        for ratio in (0.125, 0.25, 0.5)
        for how in ("uniform", "importance", "optimal", "global")
    }


def thresholds(similar: dict[parts.Part, float], most: int) -> list[float]:
    """Between each two similarities that follow each other, the highest first, so that each drops one part more."""
    values = sorted(similar.values(), reverse=True)[: most + 1]
    return [(a + b) / 2 for a, b in pairwise(values)]


def threshold(stats: Stats, skeleton: Skeleton) -> Recipes:
    rows: Recipes = {}
    for name, kind, blocks in (("layer_drop", "moe", False), ("block_drop", "block", True)):
        room = left(skeleton, unchanged(skeleton.sites), blocks=blocks)
        candidates = [(kind, index) for index in (room.blocks if blocks else room.moe)]
        similar = {part: parts.similarity(part, stats, "residual") for part in candidates}
        most = room.most(candidates, mixed=False)
        rows |= {f"{name} above {value:.4f}": one({name: {"threshold": round(value, 6)}}) for value in thresholds(similar, most)}
    return rows


def mixed(sizes: Sequence[int] = (2, 4)) -> Recipes:
    rows: Recipes = {}
    for size in sizes:
        for rerank in ("none", "kl"):
            rows[f"{size} MoE sub-layers, {rerank}"] = one({"layer_drop": {"count": size, "rerank": rerank}})
            rows[f"{size // 2} decoder layers, {rerank}"] = one({"block_drop": {"count": size // 2, "rerank": rerank}})
            rows[f"{size} of both, {rerank}"] = one({"layer_drop": {"count": size, "blocks": True, "rerank": rerank}})
    return rows


def recovery(steps: Sequence[int] = (0, 30, 100, 300), method: str = "logits") -> Recipes:
    start = {"layer_drop": {"ratio": 0.25}}
    samples = max(64, 4 * max(steps) + 64)
    train = {"method": method, "samples": samples, "length": 256, "batch": 4, "patience": 100}
    return {f"{count} steps": one(start, **({"recover": {**train, "steps": count}} if count else {})) for count in steps}


def size(sizes: Sequence[int] = (4, 16, 64, 256)) -> Recipes:
    steps = {
        "drop 25%": {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}},
        "moe_pruner 50%": {"weight_prune": {"ratio": 0.5, "score": "moe_pruner"}},
        "sparsegpt 50%": {"weight_prune": {"ratio": 0.5, "score": "sparsegpt"}},
    }
    return {f"{name}, {samples} samples": one(step, calibration={"samples": samples}) for name, step in steps.items() for samples in sizes}


def domain(texts: Sequence[str]) -> Recipes:
    steps = {
        "drop 25%": {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}},
        "moe_pruner 50%": {"weight_prune": {"ratio": 0.5, "score": "moe_pruner"}},
    }
    choices = {**{Path(text.rpartition("=")[2]).stem: [text] for text in texts}, "all": list(texts)}
    return {f"{name} on {label}": one(step, calibration={"data": some}) for name, step in steps.items() for label, some in choices.items()}


def gathered(given: argparse.Namespace, reach: int) -> tuple[Skeleton, Stats]:
    skeleton = Skeleton.of(given.model)
    text = calibrate(
        skeleton.checkpoint, given.calibration, samples=given.samples, length=given.length, context=skeleton.context,
        vocabulary=skeleton.config.get_text_config().vocab_size, seed=0,
    )  # fmt: skip
    return skeleton, statistics(skeleton, text.batches(given.device), reach=reach, device=given.device)


def searches(given: argparse.Namespace, ratio: float, budgets: Sequence[int]) -> dict[str, list[float]]:
    """Loss of the best set found over the optimum's, of each layer, by search and budget; seeds 0 to 4 where chance plays."""
    skeleton, stats = gathered(given, max(site.num_experts for site in Skeleton.of(given.model).sites.values()))
    found: dict[str, list[float]] = {}
    for index, site in skeleton.sites.items():
        loss = SubsetLoss(stats.layers[index])
        space = search.Space(site.num_experts, round(ratio * site.num_experts), site.rule.groups)
        best, greedy = search.exhaustive(loss, space).losses[0], search.greedy(loss, space)
        found.setdefault(f"exhaustive ({space.size()} sets)", []).append(1.0)
        found.setdefault(f"greedy ({greedy.evaluations} sets)", []).append(greedy.losses[0] / best)
        for budget in budgets:
            for seed in range(5):
                drawn = search.random(loss, space, draws=budget, seed=seed).losses[0]
                bred = search.genetic(
                    loss, space, population=min(100, max(4, budget // 4)), generations=50, max_evaluations=budget, seed=seed
                )
                found.setdefault(f"random ({budget} sets)", []).append(drawn / best)
                found.setdefault(f"genetic alone ({budget} sets)", []).append(bred.losses[0] / best)
    return found


def main() -> None:
    questions: dict[str, Callable[[argparse.Namespace], Recipes]] = {
        "counts": lambda given: counts(),
        "threshold": lambda given: threshold(*reversed(gathered(given, 0))),
        "mixed": lambda given: mixed(),
        "recovery": lambda given: recovery(given.steps, given.method),
        "size": lambda given: size(),
        "domain": lambda given: domain(given.calibration),
    }
    arguments = comparison.options(__doc__, ["-"])
    arguments.add_argument("question", choices=[*questions, "search"])
    arguments.add_argument("--method", default="logits", help="recovery: lora, logits or experts")
    arguments.add_argument("--steps", nargs="+", type=int, default=[0, 30, 100, 300], help="recovery: of 4 sequences each")
    arguments.add_argument("--ratio", type=float, default=0.5, help="search: share of the experts that goes")
    arguments.add_argument("--budgets", nargs="+", type=int, default=[16, 64, 256, 1024], help="search: sets evaluated")
    given = arguments.parse_args()
    if given.question == "search":
        print("loss over the optimum's, mean (worst) of layers and seeds; share of runs that found the optimum")
        for name, shares in searches(given, given.ratio, given.budgets).items():
            hit = sum(share <= 1 + 1e-9 for share in shares) / len(shares)
            print(f"  {name:<32} {sum(shares) / len(shares):.4f} ({max(shares):.4f})  {hit:.0%}", flush=True)
        return
    recipes = questions[given.question](given)
    if given.question in ("size", "domain"):  # these say their own calibration; the rest of it is as given
        spec = {"data": given.calibration, "samples": given.samples, "length": given.length}
        recipes = {name: {**body, "calibration": {**spec, **body["calibration"]}} for name, body in recipes.items()}
    rows = comparison.run(given, given.question, recipes, own_calibration=given.question in ("size", "domain"))
    for name, row in rows.items():
        texts = "  ".join(f"{text} {values['kl']:.4f}" for text, values in row.texts.items())
        gone = json.loads(
            Path(given.out, comparison.folder(given.question, given.model), row.name, "trimoe.json").read_text(encoding="utf-8")
        )["decisions"]
        lost = [int(index) for index, decision in gone.items() if decision.get("gone")]
        print(
            f"{name:<34} {row.share:6.1%}  KL {row.kl:.4f}  perplexity {row.perplexity_before:.2f} -> {row.perplexity:.2f}  {texts}  {lost or ''}"
        )


if __name__ == "__main__":
    main()
