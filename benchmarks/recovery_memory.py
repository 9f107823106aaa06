"""The most memory that every recovery method takes, beside what plan says (trimoe/plan/recovery_memory.py).

    python benchmarks/recovery_memory.py

Makes a random bfloat16 qwen3_moe checkpoint, drops an eighth of its experts, and trains the result for two steps by each method in
a process of its own, in float32 and bfloat16; method experts learns from another random model, for from its own original nothing is
left to learn. What is measured is RssAnon: memory that the process holds. Pages of files that are mapped (weights that were read)
give way when memory is short and are not counted. "x weights" leaves out what imports take. Linux only.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_model
import torch
from alternate import table, write_json

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.plan import limits, memory, recovery_memory
from trimoe.recipe.recover import parsed
from trimoe.recover import adapters
from trimoe.show.format import human

METHODS: dict[str, dict[str, Any]] = {
    "router": {"method": "router"},
    "lora": {"method": "lora"},
    "logits, adapters": {"method": "logits"},
    "logits, all weights": {"method": "logits", "train": "full"},
    "sft": {"method": "sft"},
    "router, streamed": {"method": "router", "stream": True},
    "lora, streamed": {"method": "lora", "stream": True},
    "logits, adapters, streamed": {"method": "logits", "stream": True},
    "experts, streamed": {"method": "experts"},
    "experts, in memory": {"method": "experts", "stream": False},
}


def apart(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Call `function` in a process of its own, a copy of this one that has imported everything; its largest RssAnon, in bytes."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args, kwargs=options)
    process.start()
    most = 0
    while process.is_alive():
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (ProcessLookupError, FileNotFoundError):
            break
        most = max([most, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.004)
    process.join()
    if process.exitcode:
        sys.exit(f"{function.__name__} failed")
    return most


def make(config: Any, model: Path, other: Path, text: Path, folder: Path) -> None:
    for seed, place in enumerate((model, other)):
        place.mkdir()
        random_model.save(config, place, seed)
    text.write_text("".join(chr(32 + (7 * place * place + place) % 90) for place in range(20_000)), encoding="utf-8")
    dropped = {"expert_drop": {"ratio": 0.125, "score": "random", "counts": "uniform"}}
    trimoe.compress(model, {"steps": [dropped]}, folder, calibration=[str(text)], samples=4, length=32)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("layers", 5),
        ("experts", 16),
        ("hidden", 1280),
        ("width", 640),
        ("top-k", 4),
        ("vocabulary", 8192),
        ("batch", 2),
        ("length", 64),
    ):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--methods", nargs="*", default=list(METHODS))
    arguments.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    arguments.add_argument("--folder", help="where the model and results go (default: a temporary folder)")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    config = random_model.config_of(
        layers=given.layers, experts=given.experts, hidden=given.hidden, width=given.width, top_k=given.top_k, vocabulary=given.vocabulary,
        context=512, dtype="bfloat16",
    )  # fmt: skip
    rows = []
    adapters.import_peft()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        model, other, text = Path(scratch, "model"), Path(scratch, "other"), Path(scratch, "text.txt")
        folder, out = Path(scratch, "finished"), Path(scratch, "out")
        apart(make, config, model, other, text, folder)
        numbers = recovery_memory.weights(Skeleton.of(str(folder)))
        for dtype in given.dtypes:
            for name in given.methods:
                spec = parsed(
                    METHODS[name]
                    | {
                        "data": str(text),
                        "samples": given.batch + 1,
                        "length": given.length,
                        "batch": given.batch,
                        "epochs": 2,
                        "dtype": dtype,
                        "rate": 1e-4,
                    }
                )
                teacher = {"experts": other, "lora": None, "sft": None}.get(spec.method, model)
                original = None if teacher is None else Skeleton.of(str(teacher))
                planned = memory.of_training(Skeleton.of(str(folder)), original, spec, "cpu")[0].host["recovery"]
                start = time.monotonic()
                peak = apart(trimoe.recover, folder, out, spec, teacher=teacher, any_memory=True)
                shutil.rmtree(out)
                whole = numbers * getattr(torch, dtype).itemsize
                rows.append({"method": name, "dtype": dtype, "weights": human(whole), "planned": human(planned), "measured": human(peak),
                             "planned / measured": f"{planned / peak:.2f}", "x weights": f"{(peak - limits.IMPORTS) / whole:.2f}",
                             "seconds": f"{time.monotonic() - start:.0f}"})  # fmt: skip
                print(rows[-1], flush=True)
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
