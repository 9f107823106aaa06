"""plan, stats, compress and eval of a model larger than the memory they are given: Qwen1.5-MoE-A2.7B's shape (28.6 GB in bfloat16), or
many small layers (4 GB), which is cheap enough for every night.

    python benchmarks/bigger_than_memory.py --limit 6            # as root: a memory cgroup, swap off
    python benchmarks/bigger_than_memory.py --shape many_layers --limit 1.5 --low-rank

Every command runs in a process of its own under a hard limit of so many GiB: a memory cgroup (version 2 or 1; page cache counts, and is what
the kernel takes back first), or, where none can be made, RLIMIT_DATA (memory of the process's own). Printed: the process's peak resident
memory, the share of it that is no mapped file, the cgroup's peak with page cache, and seconds. The exit code is 1 if a command failed (one
that needs more than its limit is killed).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_model
from alternate import table, write_json

from trimoe.show.format import human

ROOTS = (  # folder, a file that is there where memory is accounted for, the limit, the peak
    (Path("/sys/fs/cgroup"), "cgroup.controllers", "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


SHAPES: dict[str, tuple[Callable[[int], Any], int]] = {  # by number of layers, and how many there are
    "qwen15_moe": (random_model.qwen15_moe, 24),
    "many_layers": (
        lambda layers: random_model.config_of(
            layers=layers, experts=64, hidden=512, width=512, top_k=4, vocabulary=32000, context=4096, dtype="bfloat16"
        ),
        40,
    ),
}


class Limit:
    """A cgroup of our own where one can be made; else a limit on the process's data."""

    def __init__(self, size: int):
        self.size, self.folder, self.peak_file = size, None, ""
        for root, sign, limit, peak in ROOTS:
            folder = root / f"trimoe-{os.getpid()}"
            if not (root / sign).exists():
                continue
            try:
                folder.mkdir()
                (folder / limit).write_text(str(size))
            except OSError:
                if folder.is_dir():
                    folder.rmdir()
                continue
            self.folder, self.peak_file = folder, peak
            return

    @property
    def kind(self) -> str:
        return "RLIMIT_DATA" if self.folder is None else f"cgroup {self.folder}"

    def enter(self) -> None:
        """In the child, before it becomes the command."""
        if self.folder is None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.size, self.size))
        else:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """The most since the last time; page cache included."""
        if self.folder is None:
            return 0
        path = self.folder / self.peak_file
        found = int(path.read_text())
        with contextlib.suppress(OSError):  # older kernels keep the mark
            path.write_text("0")
        return found

    def close(self) -> None:
        if self.folder is not None:
            self.folder.rmdir()


def run(limit: Limit, words: list[str]) -> dict[str, Any]:
    """One trimoe command under the limit, watched to its end."""
    limit.peak()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimoe.cli", *words], preexec_fn=limit.enter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    resident = own = 0
    os.set_blocking(process.stdout.fileno(), False)  # type: ignore[union-attr]
    text = b""
    while process.poll() is None:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            resident = max(resident, int(status.get("VmHWM", "0 kB").split()[0]) << 10)
            own = max(own, int(status.get("RssAnon", "0 kB").split()[0]) << 10)
        except (ProcessLookupError, FileNotFoundError):
            break
        text += process.stdout.read() or b""  # type: ignore[union-attr]
        time.sleep(0.05)
    code = process.wait()
    text += process.stdout.read() or b""  # type: ignore[union-attr]
    row = {
        "command": " ".join(words[:1]), "exit code": code, "resident": human(resident), "of its own": human(own),
        "with page cache": human(limit.peak()), "seconds": f"{time.perf_counter() - start:.0f}",
    }  # fmt: skip
    print(table([row]), flush=True)
    print(text.decode(errors="replace")[-1500:], flush=True)
    return row


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", choices=SHAPES, default="qwen15_moe")
    arguments.add_argument("--layers", type=int, help="default: as many as the shape has")
    arguments.add_argument("--limit", type=float, default=6.0, help="GiB")
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument(
        "--low-rank", action="store_true", help="factor the experts that stay (55 %% of their parameters go), too: an hour or two"
    )
    arguments.add_argument("--folder", help="where model and result go (default: a temporary folder); a model that is there is taken")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    config_of, layers = SHAPES[given.shape]
    layers = given.layers or layers
    limit = Limit(int(given.limit * (1 << 30)))
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        model = Path(given.folder or scratch, f"random-{layers}" if given.shape == "qwen15_moe" else f"{given.shape}-{layers}")
        if not (model / "config.json").is_file():
            shutil.rmtree(model, ignore_errors=True)
            model.mkdir(parents=True)
            random_model.save(config_of(layers), model)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(f"{size / 1e9:.1f} GB of safetensors; limit {human(limit.size)} by {limit.kind}", flush=True)
        recipe = Path(scratch, "recipe.yaml")
        steps = "  - expert_drop: {ratio: 0.25, counts: uniform, search: greedy}\n"
        steps += "  - low_rank: {ratio: 0.55, rank: uniform}\n" if given.low_rank else ""
        recipe.write_text(f"steps:\n{steps}calibration: {{search_tokens: 512}}\n")
        text = ["--samples", str(given.samples), "--length", str(given.length)]
        stats, out = Path(scratch, "stats.safetensors"), Path(scratch, "out")
        rows = [
            run(limit, ["plan", str(model), "--recipe", str(recipe), *text]),
            run(limit, ["stats", str(model), "--out", str(stats), *text]),
            run(limit, ["compress", str(model), "--recipe", str(recipe), "--out", str(out), "--stats", str(stats), *text]),
            run(limit, ["eval", str(out), "--length", str(given.length), "--tokens", "512"]),
        ]
    limit.close()
    print(table(rows))
    write_json(given.json, {"bytes": size, "limit": limit.size, "by": limit.kind, "rows": rows})
    failed = [row["command"] for row in rows if row["exit code"]]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
