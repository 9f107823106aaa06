"""What gathering statistics adds to running the model: trimoe's statistics pass against the same streamed forward run without it.

    python benchmarks/statistics_pass.py

Both walk the same random qwen3_moe checkpoint from disk, layer by layer, on the same tokens, and stop before the head; the plain walk
uses transformers' default experts function. Below it, one layer's experts alone: trimoe's experts function with an observer that keeps
nothing, against each of transformers' own, on one batch. All in turns in one process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import random_model
import torch
from alternate import common_options, middle, ratio, table, take_turns, write_json

from trimoe.calibration import gather, observer
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.walk.expert_inputs import InputRecorder
from trimoe.walk.walk import LayerWalk

FEW = 128  # tokens for batched_mm, which copies an expert's weights for every token


class Blind:
    """An observer that does nothing."""

    def see_expert(self, *given: object) -> None: ...

    def see_outputs(self, *given: object) -> None: ...


def plain_walk(skeleton: Skeleton, batches: list[torch.Tensor]) -> None:
    walk = LayerWalk(skeleton, batches)
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)


@torch.no_grad()
def experts_alone(skeleton: Skeleton, batch: torch.Tensor, other: str, rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of one layer's experts under trimoe's function and under `other`, for what the layer really gives them."""
    walk, site = LayerWalk(skeleton, [batch]), skeleton.sites[0]
    with walk.layer(0) as layer:
        recorder = InputRecorder(batch.numel())
        with recorder.attached(layer, site):
            walk.advance(0, layer)
        seen = recorder.seen()
        experts = site.experts_of(layer)
        experts._trimoe_observer = Blind()

        def under(name: str) -> None:
            with transformers5.experts_implementation(layer, name):
                experts(seen.x_TH, seen.index_TK, seen.weight_TK)

        return take_turns({"trimoe": lambda: under(observer.NAME), "other": lambda: under(other)}, rounds, clock)


def main() -> None:
    arguments = common_options(__doc__, rounds=15)
    for name, value in (("layers", 4), ("hidden", 512), ("width", 384), ("experts", 32), ("top-k", 4)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--length", type=int, default=512)
    arguments.add_argument(
        "--expert-tokens", type=int, default=1024, help="tokens of the batch for the experts alone (batched_mm copies weights per token)"
    )
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    config = random_model.config_of(
        layers=given.layers,
        experts=given.experts,
        hidden=given.hidden,
        width=given.width,
        top_k=given.top_k,
        vocabulary=96,
        context=given.length,
    )
    with tempfile.TemporaryDirectory() as folder:
        random_model.save(config, Path(folder))
        skeleton = Skeleton.of(folder)
        batches = random_model.batches(given.tokens, given.length, 96)
        walks = {
            "statistics": lambda: gather.statistics(skeleton, batches, reach=0, needs=gather.ROUTING),
            "routing and outputs only": lambda: gather.statistics(skeleton, batches, reach=0, needs=frozenset()),
            "plain": lambda: plain_walk(skeleton, batches),
        }
        times = take_turns(walks, given.rounds, given.clock)
        rows = [
            {"what": f"{name} / plain streamed forward", "seconds": f"{middle(times[name]):.2f} / {middle(times['plain']):.2f}",
             "ratio (quartiles)": ratio(times[name], times["plain"])} for name in list(walks)[:-1]
        ]  # fmt: skip
        for other, batch in (("eager", batches[0]), ("grouped_mm", batches[0]), ("batched_mm", batches[0][:1, :FEW])):
            alone = experts_alone(skeleton, batch, other, given.rounds, given.clock)
            rows.append({
                "what": f"trimoe's experts function / {other}, {batch.numel()} tokens",
                "seconds": f"{middle(alone['trimoe']):.3f} / {middle(alone['other']):.3f}", "ratio (quartiles)": ratio(alone["trimoe"], alone["other"]),
            })  # fmt: skip
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
