"""Where the statistics pass spends its time: seconds and share by part, on random weights in the shape of a real model.

    python benchmarks/profile_statistics.py --shape qwen15_moe --layers 2 --samples 4 --length 256
    python benchmarks/profile_statistics.py --shape mixtral --layers 1 --samples 4 --length 256

Timers stand around the functions that do the work, inner ones taken from outer ones, so that the shares add up to the whole pass. The
page cache is dropped before it where that is allowed (root), so that weights come from the disk as those of a large model do.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import random_model
import torch
from alternate import CLOCKS, common_options, table, write_json

from trimoe.calibration import gather, observer
from trimoe.calibration.statistics import Stats
from trimoe.checkpoint import folder as checkpoint
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.walk import hidden_states, walk

SHAPES: dict[str, Callable[[int], Any]] = {
    "qwen15_moe": random_model.qwen15_moe,
    "mixtral": lambda layers: random_model.config_of(  # its layer: 8 experts, 4 times as wide as the stream
        layers=layers, experts=8, hidden=2048, width=7168, top_k=2, vocabulary=32000, context=8192
    ),
}
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("reading shards", checkpoint, "_fill"),
    ("looking for NaN and infinities", checkpoint.Checkpoint, "_finite"),
    ("loading: stacking, converting, fresh memory", transformers5, "load_into"),
    ("loading: stacking, converting, fresh memory", checkpoint.Checkpoint, "read_into"),
    ("freeing a layer", walk, "_to_meta"),
    ("freeing a layer", walk, "give_back"),
    ("asking the system to read ahead", walk, "_ask_ahead"),
    ("attention and the rest of the layer", walk.LayerWalk, "step"),
    ("routing, weighting and adding of experts' outputs", observer, "observed_experts"),
    ("experts' matrix products", observer, "run_expert"),
    ("channel norms, means and maxima", observer.Observer, "see_expert"),
    ("norms and the energy of pairs", observer.Observer, "see_outputs"),
    ("Gram of searched tokens, its experts' products included", observer.Observer, "see_search"),
    ("cosines", observer._Cosines, "_layer"),
    ("cosines", Stats, "see_block"),
    ("scores from weights", gather, "weight_scores"),
    ("hidden states kept or spilled", hidden_states.HiddenStates, "__getitem__"),
    ("hidden states kept or spilled", hidden_states.HiddenStates, "__setitem__"),
)


class Clock:
    """Seconds by part; while an inner part runs, the outer one's stands still."""

    def __init__(self, clock: str) -> None:
        self.now = CLOCKS[clock]
        self.seconds: collections.Counter[str] = collections.Counter()
        self.stack: list[str] = ["everything else"]
        self.since = self.now()

    def switch(self) -> None:
        now = self.now()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.stack.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        return inside


@contextlib.contextmanager
def watched(kind: str) -> Iterator[Clock]:
    clock, before = Clock(kind), [(owner, name, getattr(owner, name)) for _, owner, name in PARTS]
    for part, owner, name in PARTS:
        setattr(owner, name, clock.timed(part, getattr(owner, name)))
    transformers5.register_experts(observer.NAME, observer.observed_experts)
    try:
        yield clock
    finally:
        clock.switch()
        for owner, name, function in before:
            setattr(owner, name, function)
        transformers5.register_experts(observer.NAME, observer.observed_experts)


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return False
    return True


def main() -> None:
    arguments = common_options(__doc__, rounds=1)
    arguments.add_argument("--shape", choices=SHAPES, default="qwen15_moe")
    arguments.add_argument("--layers", type=int, default=2)
    arguments.add_argument("--samples", type=int, default=4)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--reach", type=int, default=0, help="experts of a token whose Gram is kept, as searches want it")
    arguments.add_argument("--search-tokens", type=int, default=512)
    arguments.add_argument("--folder", help="where the model goes (default: a temporary folder); one that is there is taken")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch)
        if not (folder / "config.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            random_model.save(SHAPES[given.shape](given.layers), folder)
        skeleton = Skeleton.of(str(folder))
        batches = random_model.batches(given.samples * given.length, given.length, 96)
        cold = drop_page_cache()
        with watched(given.clock) as clock:
            gather.statistics(skeleton, batches, reach=given.reach, search_tokens=given.search_tokens, needs=gather.ROUTING)
    whole = sum(clock.seconds.values())
    rows = [{"part": part, "seconds": f"{took:.2f}", "share": f"{took / whole:.1%}"} for part, took in clock.seconds.most_common()]
    rows.append({"part": "all", "seconds": f"{whole:.2f}", "share": ""})
    print(table(rows))
    print(f"{given.shape}, {len(skeleton.layers)} layers, {given.samples} x {given.length} tokens, {given.threads} threads, {given.clock} clock,"
          f" page cache {'cold' if cold else 'as it was'}")  # fmt: skip
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
