"""Does plan's expected time come true? Predicted and measured seconds of every stage, and their ratio.

    python benchmarks/cost_model.py                                 # the built-in models and a random one of 1 GB
    python benchmarks/cost_model.py --models builtin:mini-mixtral --recipes moe-i2 --samples 32

Speeds are measured right before each run (not taken from the cache). Beside the time of the clock stands the process's own: on a machine that
others use the former is longer, by about as much as they take. Start, tokenising and the fingerprint are in neither.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import random_model
import torch
from alternate import table, write_json

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.plan import machine, timing
from trimoe.progress import Reporter
from trimoe.recipe import recipe

RECIPES = ("expert-drop", "moe-i2", "slim-int4")
BEFORE = ("Read headers and plan", "Tokenise the calibration text", "Fingerprint the model")


class Watch(Reporter):
    """Keeps how long each stage took: seconds of the clock and of this process."""

    def __init__(self) -> None:
        super().__init__("quiet")
        self.stages: list[tuple[str, float, float]] = []
        self.own = [time.process_time()]

    def finished(self, label: str, seconds: float, about: str) -> None:
        super().finished(label, seconds, about)
        now = time.process_time()
        if label not in BEFORE:
            self.stages.append((label, seconds, now - self.own[0]))
        self.own[0] = now


def run(model: str, name: str, samples: int, length: int, speed: machine.Rates) -> list[dict[str, Any]]:
    """Compress, and what was expected of it."""
    changed = [f"calibration.samples={samples}", f"calibration.length={length}"]
    expected = timing.estimate(Skeleton.of(model), recipe.load(name, changed), speed=speed)["stages"]
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trimoe.compress(model, name, Path(folder) / "out", changes=changed, reporter=watch)
    rows, names = [], [stage["stage"] for stage in expected]
    for label in dict.fromkeys([*names, *(label for label, _, _ in watch.stages)]):
        guess = sum(stage["seconds"] for stage in expected if stage["stage"] == label)
        clock, own = (sum(stage[place] for stage in watch.stages if stage[0] == label) for place in (1, 2))
        rows.append((label, guess, clock, own))
    rows.append(("in all", *(sum(row[place] for row in rows) for place in (1, 2, 3))))
    return [
        {"model": Path(model).name, "recipe": name, "stage": label, "predicted, s": f"{guess:.2f}", "clock, s": f"{clock:.2f}",
         "process, s": f"{own:.2f}", "predicted / clock": f"{guess / max(clock, 1e-9):.2f}", "predicted / process": f"{guess / max(own, 1e-9):.2f}"}
        for label, guess, clock, own in rows
    ]  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", default="builtin:mini-mixtral,builtin:mini-qwen2-moe,random")
    arguments.add_argument("--recipes", default=",".join(RECIPES))
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--json", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models.split(","):
            if model == "random":
                shape = dict(layers=4, experts=16, hidden=1024, width=2560, top_k=4, vocabulary=96, context=given.length)
                config = random_model.config_of(**shape)
                config.dtype = torch.bfloat16
                model = str(Path(folder) / "random-1GB")
                Path(model).mkdir()
                random_model.save(config, Path(model))
            for name in given.recipes.split(","):
                rows += run(model, name, given.samples, given.length, machine.measure())
                print(table(rows[-1:]), flush=True)
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
