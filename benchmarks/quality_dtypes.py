"""Whether float32 and bfloat16 decide alike: held-out KL of `counts: optimal`, decided in either, judged in float32.

    python benchmarks/quality_dtypes.py --model builtin:mini-mixtral --calibration english=calib-english.jsonl ... --text dev-english.jsonl ...

Both keep copies of the same weights, so that only which experts go differs. The interval is of the difference of their KLs relative to float32's: 95 %,
windows drawn again (paired), 2,000 times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any

import torch
from quality_expert_drop import PeakMemory

import trimoe
from trimoe.calibration.gather import statistics
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop.options import Greedy
from trimoe.methods.lab import Lab
from trimoe.model.decision import Decisions, unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.progress import QUIET
from trimoe.text.samples import calibrate
from trimoe.text.spec import CalibrationSpec
from trimoe.walk.decided import masked

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def kept(decisions: Decisions) -> dict[int, tuple[int, ...]]:
    return {index: tuple(decision.keep) for index, decision in decisions.items()}


def kl_of_windows(held: PeakMemory, layers: torch.nn.Module, skeleton: Skeleton, keep: dict[int, tuple[int, ...]]) -> torch.Tensor:
    """KL of each window, in nats per scored token."""
    made = []
    with contextlib.ExitStack() as stack:
        for index, left in keep.items():
            site = skeleton.sites[index]
            stack.enter_context(masked(layers[index], site, tuple(sorted(set(range(site.num_experts)) - set(left)))))
        for entry, truth in zip(held.sets, held.truth, strict=True):
            for ids, mask, log_p in zip(entry.ids_NL.split(8), entry.scored_NL.split(8), truth, strict=True):
                kl_NL = (log_p.exp() * (log_p - held._log_p(ids))).sum(-1).double() * mask
                made.append(kl_NL.sum(1) / mask.sum(1).clamp_min(1))
    return torch.cat(made)


def interval(one: torch.Tensor, other: torch.Tensor, draws: int = 2000) -> list[float]:
    """Of mean(other) / mean(one) - 1."""
    drawn = torch.randint(len(one), (draws, len(one)), generator=torch.Generator().manual_seed(0))
    off = other[drawn].mean(1) / one[drawn].mean(1) - 1
    return [float(off.quantile(q)) for q in (0.025, 0.975)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=24)
    arguments.add_argument("--tokens", type=int, default=1536)
    arguments.add_argument("--ratios", nargs="+", type=float, default=[0.125, 0.25, 0.5])
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", required=True)
    given = arguments.parse_args()

    chosen: dict[float, dict[str, Any]] = {ratio: {} for ratio in given.ratios}
    for name, dtype in DTYPES.items():
        skeleton, began = Skeleton.of(given.model, dtype), time.monotonic()
        text = calibrate(skeleton.checkpoint, given.calibration, samples=given.samples, length=256, context=skeleton.context,
                         vocabulary=skeleton.config.vocab_size, seed=given.seed)  # fmt: skip
        batches, spec = text.batches(), CalibrationSpec(samples=given.samples, length=256)
        steps = [ExpertDrop(ratio=ratio, counts="optimal", search=Greedy()) for ratio in given.ratios]
        sites = dict(skeleton.sites)
        stats = statistics(skeleton, batches, reach=max(step.reach(sites) for step in steps), seed=given.seed)
        for step in steps:
            lab = Lab(skeleton, (step,), spec, batches, given.seed, "cpu", {}, QUIET, domains=text.domains,
                      decisions=unchanged(sites), given=stats)  # fmt: skip
            decisions, metrics = step.decide(lab)
            chosen[step.ratio or 0][name] = (kept(decisions), metrics)
            print(f"{name} {step.ratio:.1%} decided after {time.monotonic() - began:.0f} s", flush=True)
    skeleton = Skeleton.of(given.model)
    model = trimoe.load(given.model, dtype=torch.float32)
    held, layers, rows = PeakMemory(model, skeleton, given.text, given.tokens), model.get_submodule(skeleton.prefix), []
    for ratio, both in chosen.items():
        kls = {name: kl_of_windows(held, layers, skeleton, keep) for name, (keep, _) in both.items()}
        for name, (keep, metrics) in both.items():
            counts = [skeleton.sites[index].num_experts - len(left) for index, left in keep.items()]
            rows.append({"model": given.model, "ratio": ratio, "dtype": name, "kl": float(kls[name].mean()), "counts": counts,
                         "sensitivity": metrics["sensitivity"], "probes": metrics["measured_on"]["sensitivity"]["layers"]})  # fmt: skip
        low, high = interval(kls["float32"], kls["bfloat16"])
        off = rows[-1]["kl"] / rows[-2]["kl"] - 1
        one, other = rows[-2:]
        print(f"{ratio:.1%}  float32 {one['kl']:.6f} {one['counts']}  bfloat16 {other['kl']:.6f} {other['counts']}  {off:+.1%}", end="")
        print(f" ({low:+.1%} to {high:+.1%})", flush=True)
    with open(given.json, "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
