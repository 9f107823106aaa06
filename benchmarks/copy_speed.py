"""How fast is dropping experts, which only copies bytes, beside `cp` of the same bytes?

    python benchmarks/copy_speed.py --folder /tmp/copy-speed

A random checkpoint is made (about 2 GB), a quarter of each layer's experts goes, and trimoe's writer takes turns with `cp` of the folder it
wrote; both end with the bytes on the disk. Only the writer is timed, not the choice of experts. Medians of the ratios within each turn.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path

import alternate
import random_model
import torch

from trimoe.model.decision import LayerDecision
from trimoe.model.skeleton import Skeleton
from trimoe.output import writer as write
from trimoe.output.layout import Layout


def written(layout: Layout, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    writer = write.Writer(layout, out)
    for group in range(len(layout.groups)):
        writer.put(group)


def copied(source: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["cp", "--reflink=never", path, out], check=True)
        with open(out / path.name, "rb") as file:
            os.fsync(file.fileno())


def seconds(job: object, *given: object) -> float:
    """With nothing of others left to write."""
    os.sync()
    start = time.perf_counter()
    job(*given)  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="for the checkpoint and its copies; needs 7 GB")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--layers", type=int, default=4)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    source = options.folder / "source"
    if not source.exists():
        source.mkdir(parents=True)
        config = random_model.config_of(
            layers=options.layers, experts=64, hidden=1024, width=640, top_k=4, vocabulary=96, context=128
        )  # fmt: skip
        random_model.save(config, source)
    skeleton = Skeleton.of(str(source))
    keep = tuple(expert for expert in range(64) if expert % 4)
    layout = Layout(skeleton, {index: LayerDecision(keep=keep) for index in skeleton.sites})
    times: dict[str, list[float]] = {"trimoe": [], "cp": []}
    written(layout, options.folder / "trimoe")
    nbytes = sum(path.stat().st_size for path in (options.folder / "trimoe").iterdir())
    for turn in range(options.rounds):
        for name in sorted(times, reverse=bool(turn % 2)):
            job = (written, layout) if name == "trimoe" else (copied, options.folder / "trimoe")
            times[name].append(seconds(*job, options.folder / (name if name == "trimoe" else "cp")))
    for name, taken in times.items():
        print(
            f"{name:<8}{alternate.middle(taken):6.2f} s {nbytes / alternate.middle(taken) / 1e6:8.0f} MB/s   {[round(s, 2) for s in taken]}"
        )
    print(f"{nbytes / 1e9:.2f} GB; speed of trimoe's writer over cp's: {alternate.ratio(times['cp'], times['trimoe'])}")


if __name__ == "__main__":
    main()
