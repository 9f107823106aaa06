"""Which experts to drop: held-out KL of every score, search and way of sharing out counts, from one statistics pass.

    python benchmarks/quality_expert_drop.py --model builtin:mini-mixtral --calibration english=calib-english.jsonl ... --text dev-english.jsonl ...

KL(original || pruned) in nats per token, mean over texts; one shot, no recovery. Decisions come from calibration text only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import torch

import trimoe
from trimoe.calibration.gather import statistics
from trimoe.evaluate.texts import windows
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop.options import Exhaustive, Genetic, Greedy, ReceptiveField
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.methods.lab import Lab
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.recipe.recipe import Recipe
from trimoe.text.samples import calibrate, encode, load_tokenizer, read_text
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.decided import masked

PAPER: dict[str, Any] = {"layer_limit": None, "protect_super_experts": False, "cross_check": False}


class PeakMemory:
    """Held-out windows and the original model's log-probabilities on them."""

    def __init__(self, model: torch.nn.Module, skeleton: Skeleton, texts: Sequence[str], tokens: int):
        tokenizer = load_tokenizer(skeleton.checkpoint)
        vocabulary, length = skeleton.config.vocab_size, min(256, skeleton.context)
        parts = [part for source in texts for part in read_text(source, "eval")]
        self.sets = [windows(p.domain, encode(tokenizer, p, vocabulary), length, length, tokens) for p in parts]
        self.model = model
        self.truth = [[self._log_p(ids) for ids in entry.ids_NL.split(8)] for entry in self.sets]

    @torch.no_grad()
    def _log_p(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits.float().log_softmax(-1)

    def kl(self) -> list[float]:
        out = []
        for entry, truth in zip(self.sets, self.truth, strict=True):
            total = 0.0
            for ids, mask, log_p in zip(entry.ids_NL.split(8), entry.scored_NL.split(8), truth, strict=True):
                total += float(((log_p.exp() * (log_p - self._log_p(ids))).sum(-1) * mask).sum())
            out.append(total / float(entry.scored_NL.sum()))
        return out


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=48)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5])
    arguments.add_argument("--only", nargs="*", help="of the methods, these")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json")
    given = arguments.parse_args()

    skeleton = Skeleton.of(given.model)
    spec = CalibrationSpec(samples=given.samples, length=256, search_tokens=given.samples * 256)
    text = calibrate(skeleton.checkpoint, given.calibration, samples=given.samples, length=256, context=skeleton.context,
                     vocabulary=skeleton.config.vocab_size, seed=given.seed)  # fmt: skip
    batches = text.batches()
    stats = statistics(skeleton, batches, reach=64, search_tokens=spec.search_tokens, seed=given.seed)
    model = trimoe.load(given.model, dtype=torch.float32)
    held = PeakMemory(model, skeleton, given.text, given.tokens)
    layers = model.get_submodule(skeleton.prefix)
    rows = []
    for ratio in given.ratios:
        field = ReceptiveField(k=3, t=3)
        options = {
            **{score: ExpertDrop(ratio=ratio, score=score, counts="uniform") for score in
               ("random", "weights", "frequency", "gate", "output_norm", "reap", "coactivation", "leave_one_out")},
            "greedy": ExpertDrop(ratio=ratio, counts="uniform", search=Greedy()),
            "genetic": ExpertDrop(ratio=ratio, counts="uniform", search=Genetic()),
            "exhaustive": ExpertDrop(ratio=ratio, counts="uniform", search=Exhaustive()),
            "genetic + KT": ExpertDrop(ratio=ratio, counts="uniform", search=Genetic(), receptive_field=field),
            "genetic, importance": ExpertDrop(ratio=ratio, counts="importance", search=Genetic(), **PAPER),
            "genetic, importance + KT": ExpertDrop(ratio=ratio, counts="importance", search=Genetic(), receptive_field=field, **PAPER),
            "genetic, relative importance": ExpertDrop(ratio=ratio, counts="importance", normalize="relative", search=Genetic()),
            "genetic, optimal": ExpertDrop(ratio=ratio, counts="optimal", search=Genetic()),
            "genetic, optimal + KT": ExpertDrop(ratio=ratio, counts="optimal", search=Genetic(), receptive_field=field),
            "reap, global": ExpertDrop(ratio=ratio, score="reap", counts="global"),
        }  # fmt: skip
        for name, step in options.items():
            if given.only and name not in given.only:
                continue
            recipe = Recipe(steps=(step,), calibration=spec)
            lab = Lab(skeleton, recipe.steps, recipe.calibration, batches, given.seed, "cpu", {}, QUIET,
                      decisions=unchanged(skeleton.sites), given=stats)  # fmt: skip
            decisions, metrics = step.decide(lab)
            losses = []
            with contextlib.ExitStack() as stack:
                for index, decision in decisions.items():
                    site = skeleton.sites[index]
                    drop = tuple(sorted(set(range(site.num_experts)) - set(decision.keep)))
                    mask = torch.zeros(1, site.num_experts, dtype=torch.bool)
                    mask[0, list(drop)] = True
                    losses.append(float(SubsetLoss(stats.layers[index])(mask)))
                    stack.enter_context(masked(layers[index], site, drop))
                kl = held.kl()
            row = {"model": given.model, "ratio": ratio, "method": name, "kl": sum(kl) / len(kl), "kls": kl,
                   "layer_loss": sum(losses) / len(losses), "counts": [skeleton.sites[i].num_experts - len(d.keep) for i, d in decisions.items()],
                   "evaluations": max((r["evaluations"] for r in metrics["layers"].values()), default=0)}  # fmt: skip
            rows.append(row)
            print(
                f"{ratio:4.0%}  {name:<24} KL {row['kl']:.4f}  mean layer loss {row['layer_loss']:.4f}  {' '.join(f'{v:.4f}' for v in kl)}  {row['counts']}",
                flush=True,
            )
    if given.json:
        with open(given.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
