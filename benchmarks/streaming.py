"""What it costs to hold one layer instead of the model: a streamed forward run against the same run with the model in memory.

    python benchmarks/streaming.py

Streamed: everything a LayerWalk does from token ids to logits, the reading of every weight from disk (in the page cache after the first
round) and transformers' fusing of the experts included; finding the architecture (Skeleton) is not, it happens once a job and is
printed. In memory: the model's own forward pass on the same batches, all logits included, from_pretrained not (printed too). Float32, in
turns in one process. Reading costs the same for any number of tokens, so the ratio is printed for few tokens and for more.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import random_model
import torch
from alternate import common_options, middle, ratio, table, take_turns, write_json
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from trimoe.model.skeleton import Skeleton
from trimoe.walk.walk import LayerWalk


def streamed(skeleton: Skeleton, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    walk = LayerWalk(skeleton, batches)
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head:
        return [head(hidden, batch) for batch, hidden in enumerate(walk.hidden)]


@torch.no_grad()
def in_memory(model: torch.nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(input_ids=batch, use_cache=False).logits for batch in batches]


def main() -> None:
    arguments = common_options(__doc__, rounds=7)
    for name, value in (
        ("layers", 8),
        ("experts", 32),
        ("hidden", 768),
        ("width", 192),
        ("top-k", 4),
        ("vocabulary", 4096),
        ("length", 512),
    ):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    config = random_model.config_of(
        layers=given.layers, experts=given.experts, hidden=given.hidden, width=given.width, top_k=given.top_k, vocabulary=given.vocabulary,
        context=given.length,
    )  # fmt: skip
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        random_model.save(config, Path(folder))
        logging.disable_progress_bar()
        start = time.perf_counter()
        skeleton = Skeleton.of(folder)
        built = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(f"{sum(info.nbytes for info in skeleton.checkpoint.tensors.values()) / 1e6:.0f} MB; ", end="")
        print(f"Skeleton {built - start:.2f} s, from_pretrained {time.perf_counter() - built:.2f} s")
        for tokens in given.tokens:
            batches = random_model.batches(tokens, given.length, given.vocabulary)
            pairs = zip(streamed(skeleton, batches), in_memory(model, batches), strict=True)
            difference = max(float((a - b).abs().max()) for a, b in pairs)
            times = take_turns(
                {"streamed": partial(streamed, skeleton, batches), "memory": partial(in_memory, model, batches)}, given.rounds, given.clock
            )
            middles = {name: middle(seconds) for name, seconds in times.items()}
            rows.append({
                "tokens": tokens, "streamed, s": f"{middles['streamed']:.2f}", "in memory, s": f"{middles['memory']:.2f}",
                "ratio (quartiles)": ratio(times["streamed"], times["memory"]), "largest logit difference": f"{difference:.0e}",
            })  # fmt: skip
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
