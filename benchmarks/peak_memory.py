"""The most memory that `trimoe compress` takes on a model larger than it, stage by stage, beside what plan says (trimoe/plan/memory.py).

    python benchmarks/peak_memory.py

Makes a random float32 qwen3_moe checkpoint of about 2 GB (10 layers of 32 experts, one shard a layer), runs the moe-i2 recipe on it
in a process of its own, and reads that process's high-water mark of resident memory (VmHWM) until it ends. The mark is set back after
every stage that the process reports, so each stage's own peak is known. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_model
from alternate import table, write_json

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.show.format import human


def watch(command: list[str]) -> tuple[list[tuple[str, int]], float]:
    """Runs `command`; each stage it reports on standard error with its peak in bytes, and the seconds it all took."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    stages, peak, text, said = [], 0, b"", b""
    while process.poll() is None:
        peak = max(peak, high_water(process.pid))
        text += process.stderr.read() or b""
        *lines, text = text.split(b"\n")
        for line in lines:
            said += line + b"\n"
            name, done, _ = line.decode().partition(": done in ")
            if done:
                stages.append((name, peak))
                print(f"{time.perf_counter() - start:5.0f} s  {name}: {human(peak)}", file=sys.stderr, flush=True)
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")
                peak = 0
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{said.decode()}{text.decode()}{(process.stderr.read() or b'').decode()}")
    return [*stages, ("Finish", peak)], time.perf_counter() - start


def high_water(process: int) -> int:
    """VmHWM in bytes; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except ProcessLookupError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 10), ("experts", 32), ("hidden", 1024), ("width", 512), ("top-k", 4), ("samples", 16), ("length", 256)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--recipe", default="moe-i2")
    arguments.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field")
    arguments.add_argument("--folder", help="where the model and the result go (default: a temporary folder)")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    config = random_model.config_of(
        layers=given.layers,
        experts=given.experts,
        hidden=given.hidden,
        width=given.width,
        top_k=given.top_k,
        vocabulary=96,
        context=given.length,
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        model = Path(folder, "model")
        model.mkdir()
        random_model.save(config, model)
        command = [sys.executable, "-m", "trimoe.cli", "compress", str(model), "--recipe", given.recipe, "--out", str(Path(folder, "out")),
                   "--samples", str(given.samples), "--length", str(given.length)]  # fmt: skip
        stages, seconds = watch([*command, *(word for change in given.set for word in ("--set", change))])
        planned = trimoe.plan(str(model), given.recipe, given.set, samples=given.samples, length=given.length)
        largest = Skeleton.of(str(model)).largest_layer
    allowed, peak = planned.peak_memory, max(stage for _, stage in stages)
    print(table([{"stage": name, "peak": human(stage)} for name, stage in stages]))
    rows = [
        ("checkpoint", planned.before.file_bytes), ("largest layer", largest), *planned.memory_split.items(), ("planned, at most", allowed),
        ("peak of trimoe compress", peak),
    ]  # fmt: skip
    print("\n" + table([{"what": name, "memory": human(size)} for name, size in rows]))
    print(f"\n{peak / allowed:.0%} of what is allowed; {seconds:.0f} s")
    write_json(given.json, {"stages": dict(stages), "rows": dict(rows), "seconds": seconds})


if __name__ == "__main__":
    main()
