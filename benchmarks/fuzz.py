"""Damaged inputs by the thousand: every one must be read, or refused by a UserError, in bounded time and memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fuzz.py --count 20000 --seed 1 --minutes 10

Changes one file of a tiny model (configuration, index, shard, tokenizer, recipe; mutations.py), runs inspect, plan, the tokenizer or a read
of every tensor on it in process, and counts what came of it. Input number n of a seed is the same wherever it is run: --only n runs that one.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutations

ROOT = Path(__file__).parent.parent
FAMILIES: dict[str, dict[str, Any]] = {  # two layers of four experts where the family allows it: the fewer tensors, the more inputs
    "mixtral": dict(num_hidden_layers=2, num_local_experts=4),
    "deepseek_v3": dict(num_hidden_layers=2, n_routed_experts=4),
    "gpt_oss": dict(num_hidden_layers=2, num_local_experts=4),
    "qwen3_next": dict(num_hidden_layers=2, num_experts=4, layer_types=["linear_attention", "full_attention"]),
    "jamba": dict(num_hidden_layers=3, num_experts=4),
}
SECONDS, HARD_SECONDS = 20, 600  # of the processor for one input, noticed by Python; of the clock for BATCH of them, by the watchdog
BATCH = 100  # inputs between two looks at the clock and the counts
MEMORY = 6 << 30  # bytes of address space beyond what the imports took
GROWTH = 1 << 30  # a single input that makes the process this much larger is a finding
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
KINDS = {"config.json": 20, "header": 35, INDEX: 10, "bytes": 15, "tokenizer": 8, "recipe": 12}  # weights of the draw


class Bench:
    """Tiny models in a folder of their own, and one input after another run on them."""

    def __init__(self, folder: Path, seed: int):
        import trimoe
        from trimoe import errors
        from trimoe.checkpoint import folder as checkpoint
        from trimoe.model import skeleton
        from trimoe.plan import inspection
        from trimoe.text import samples

        self.trimoe, self.calibration, self.Checkpoint, self.UserError = trimoe, samples, checkpoint.Checkpoint, errors.UserError
        self.inspection, self.folder, self.seed = inspection, folder, seed
        self.models = {family: folder / family for family in FAMILIES}
        self.clean = {(name, path.name): path.read_bytes() for name, model in self.models.items() for path in model.iterdir()}
        self.skeletons = {name: skeleton.Skeleton.of(str(model)) for name, model in self.models.items()}
        self.size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def make(self, number: int) -> tuple[str, str, Path, bytes]:
        """(kind, family, file, its new content) of an input."""
        rng = random.Random(f"{self.seed}:{number}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        family = rng.choice(list(FAMILIES))
        name = {"header": SHARD, "bytes": SHARD, "recipe": "recipe.yaml"}.get(kind, kind)
        name = rng.choice(("tokenizer.json", "tokenizer_config.json")) if kind == "tokenizer" else name
        clean = self.clean.get((family, name), b"")
        if kind == "recipe":
            content = mutations.recipe(rng)
        elif kind == "header":
            content = mutations.shard(clean, rng)
        else:
            content = mutations.torn(clean, rng) if kind == "bytes" else mutations.mutated(clean, rng)
        return kind, family, self.models[family] / name, content

    def use(self, kind: str, family: str, number: int) -> str:
        """What trimoe does with the files as they lie there now."""
        model = self.models[family]
        if kind == "recipe":
            self.trimoe.plan(self.skeletons[family], str(model / "recipe.yaml"))
        elif kind == "tokenizer":
            tokenizer = self.calibration.load_tokenizer(self.Checkpoint.open(str(model)))
            self.calibration.encode(tokenizer, self.calibration.Text("x", ("some text, and more",)), 96)
        elif kind == "bytes":
            checkpoint = self.Checkpoint.open(str(model))
            checkpoint.read_together(list(checkpoint.tensors))
        elif number % 4:  # inspect plans every method, which takes longer
            str(self.trimoe.plan(str(model), mutations.RECIPES[0])).encode()
        else:
            about = self.trimoe.inspect(str(model))
            self.inspection.table(about).encode()
            return "read" if about["supported"] else f"refused: {about['reason']}"
        return "read"

    def run(self, number: int) -> tuple[str, str, str]:
        """(kind, outcome, detail) of one input; the file is as it was afterwards."""
        kind, family, path, content = self.make(number)
        path.write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome, detail = "read", self.use(kind, family, number)
        except self.UserError as error:
            outcome, detail = "refused", str(error)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/trimoe/" in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            outcome = "slow" if isinstance(error, TimeoutError) else "crashed"
            detail = f"{type(error).__name__} at {where}: {str(error)[:150]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if detail.startswith("refused: "):
            outcome = "refused"
        if "\n" in detail and outcome == "refused":
            outcome, detail = "crashed", f"two lines: {detail[:150]!r}"
        if outcome == "refused" and "allocate" in detail:  # asked for, never filled, refused by the system
            outcome = "refused, too large"
        before, self.size = self.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if (self.size - before) * 1024 > GROWTH:
            outcome, detail = "large", detail[:150]
        (path.unlink if kind == "recipe" else lambda: path.write_bytes(self.clean[family, path.name]))()
        return kind, outcome, detail


def late(*_: Any) -> None:
    raise TimeoutError


def prepare(folder: Path) -> None:
    """Two-shard models of a few kilobytes each."""
    sys.path.insert(0, str(ROOT / "tests"))
    import families
    import torch

    for family, changes in FAMILIES.items():
        model = families.build(family, dtype=torch.bfloat16, **changes)
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        model.save_pretrained(folder / family, max_shard_size=int(0.6 * size))
        families.tokenizer().save_pretrained(folder / family)
        shards = sorted((folder / family).glob("*.safetensors"))
        assert len(shards) == 2, (family, shards)


def work(folder: Path, seed: int, numbers: range, until: float, keep: Path) -> None:
    """One process: lines of JSON on standard output, one an input that is of interest, and one with the counts at the end."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    signal.signal(signal.SIGPROF, late)
    bench = Bench(folder, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    (folder / "count").write_text("{}")
    for done, number in enumerate(numbers):
        if done % BATCH == 0:
            if time.time() > until:
                break
            faulthandler.dump_traceback_later(HARD_SECONDS, exit=True)
            (folder / "count").write_text(json.dumps(counts))
        (folder / "at").write_text(str(number))
        kind, outcome, detail = bench.run(number)
        counts[f"{kind}: {outcome}"] += 1
        if outcome not in ("read", "refused", "refused, too large"):
            place = detail.partition(":")[0] + detail.partition(": ")[0][-30:]
            seen[place] += 1
            if seen[place] <= 3:
                _, family, path, content = bench.make(number)
                (keep / f"{seed}-{number}-{family}-{path.name}").write_bytes(content)
                print(json.dumps([number, kind, family, outcome, detail]), flush=True)
    (folder / "count").write_text(json.dumps(counts))


def drive(folder: Path, seed: int, numbers: range, until: float, keep: Path) -> Callable[[], collections.Counter[str]]:
    """Starts a worker; the answer waits for it, starts it again behind an input that killed it, and gives the counts."""
    total: collections.Counter[str] = collections.Counter()

    def start(rest: range) -> subprocess.Popen[str]:
        hidden = {"worker": folder, "span": f"{rest.start}:{rest.stop}:{rest.step}", "until": until, "seed": seed, "keep": keep}
        words = [word for name, value in hidden.items() for word in (f"--{name}", str(value))]
        return subprocess.Popen([sys.executable, __file__, *words], text=True)

    first = start(numbers)

    def wait() -> collections.Counter[str]:
        process = first
        while True:
            code = process.wait()
            total.update(json.loads((folder / "count").read_text()))
            if code == 0:
                return total
            at = int((folder / "at").read_text())
            total["killed"] += 1
            print(json.dumps([at, "killed", code]), flush=True)
            for family in FAMILIES:  # what the dead process was reading is still there
                shutil.rmtree(folder / family)
                shutil.copytree(folder.parent / "clean" / family, folder / family)
            process = start(range(at + numbers.step, numbers.stop, numbers.step))

    return wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="run this input alone and show its traceback")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="where inputs of interest are saved")
    for hidden in ("--worker", "--span", "--until"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(Path(given.worker), given.seed, range(*map(int, given.span.split(":"))), float(given.until), given.keep)
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        folder = Path(temporary)
        prepare(folder / "clean")
        if given.only is not None:
            bench = Bench(folder / "clean", given.seed)
            kind, family, path, content = bench.make(given.only)
            print(kind, family, path.name, content[:3000])
            path.write_bytes(content)
            print(bench.use(kind, family, given.only))
            return
        given.keep.mkdir(exist_ok=True)
        began = time.time()
        waits = []
        for process in range(given.processes):
            shutil.copytree(folder / "clean", folder / str(process))
            numbers = range(process, given.count, given.processes)
            waits.append(drive(folder / str(process), given.seed, numbers, began + 60 * given.minutes, given.keep))
        total = sum((wait() for wait in waits), collections.Counter())
        took, count = time.time() - began, sum(total.values())
        for name, number in sorted(total.items()):
            print(f"{name:<50}{number:>9,}")
        print(f"{count:,} inputs in {took:.0f} s: {count / took:.0f} a second in {given.processes} processes")


if __name__ == "__main__":
    main()
