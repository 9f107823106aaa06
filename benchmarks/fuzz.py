"""Damaged inputs by the thousand: every one must be read, or refused by a UserError, in bounded time and memory.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fuzz.py --count 20000 --seed 1 --minutes 10

Changes one file of a tiny model (configuration, index, shard, tokenizer, recipe), runs inspect, plan, the tokenizer or a read of every
tensor on it in process, and counts what came of it. Input number n of a seed is the same wherever it is run: --only n runs that one.
"""

from __future__ import annotations

import argparse
import collections
import copy
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba")
SECONDS, HARD_SECONDS = 20, 60  # for one input: noticed by Python, and by the watchdog when Python cannot
MEMORY = 6 << 30  # bytes of address space beyond what the imports took
GROWTH = 1 << 30  # a single input that makes the process this much larger is a finding
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
KINDS = {"config.json": 20, "header": 35, INDEX: 10, "bytes": 15, "tokenizer": 8, "recipe": 12}  # weights of the draw
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1000, 4097, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 64, 10**9, 10**18, 10**300, -(10**9), 0.0,
    0.5, -1.5, 1e-300, 1e308, float("nan"), float("inf"), "", "a", "8", "float16", "bfloat16", "silu", "none", "../x", "/etc/passwd", "org/x",
    "\ud800", "\x00", "\x1b[2J", "x" * 5000, [], [0], [1, 2, 3], ["a"], [[]], [None] * 3, {}, {"a": 1}, {"": {}}, {"rope_type": "yarn"},
]  # fmt: skip
PIECES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"0",
    b"-",
    b"9" * 5000,
    b"e9",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b"NaN",
    b"null",
    b"\\u",
]
RECIPES = (
    {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "importance", "search": {"genetic": {}}}}, {"low_rank": {"ratio": 0.3}}]},
    {"steps": [{"quantize": {"bits": 8, "group": 8}}], "target": "vllm", "calibration": {"samples": 4, "length": 32}},
    {"steps": [{"block_drop": {"count": 1}}], "recover": {"method": "router"}},
)


def deep(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def changed(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three things in it changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            return rng.choice(VALUES)
        box, key = rng.choice(found)
        how = rng.randrange(10)
        if how == 0:
            del box[key]
        elif how == 1:
            other, name = rng.choice(found)
            box[key] = copy.deepcopy(other[name]) if (isinstance(other, dict) and name in other) else None
        elif how == 2 and isinstance(box, dict):
            box[rng.choice(("", "a", str(key) + "x", "__metadata__", "num_experts", "layer_types", "\x1b[0m"))] = box.pop(key)
        elif how == 3 and isinstance(box[key], (int, float)) and abs(box[key]) < 1e12:
            box[key] = rng.choice((box[key] + 1, box[key] - 1, box[key] * 2, -box[key], float(box[key]), str(box[key]), [box[key]]))
        elif how == 4:
            box[key] = deep(rng.choice((2, 50, 400)))
        else:
            box[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def torn(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them changed, cut away, doubled or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        how = rng.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del out[at:]
        elif how == 2:
            del out[at : at + rng.randrange(64)]
        elif how == 3:
            out[at:at] = rng.choice(PIECES)
        else:
            out[at:at] = out[at : at + rng.randrange(200)]
    return bytes(out)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, changed in what it says or in its bytes."""
    if rng.random() < 0.3:
        return torn(data, rng)
    text = json.dumps(changed(json.loads(data), rng))
    return b"[" * 100_000 if rng.random() < 0.002 else text.encode()


def mutated_shard(data: bytes, rng: random.Random) -> bytes:
    """A shard with another header, the length before it right or wrong."""
    (length,) = struct.unpack("<Q", data[:8])
    header = mutated(data[8 : 8 + length], rng)
    said = rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1)) if rng.random() < 0.05 else len(header)
    return struct.pack("<Q", said) + header + data[8 + length :]


class Bench:
    """Tiny models in a folder of their own, and one input after another run on them."""

    def __init__(self, folder: Path, seed: int):
        import trimoe
        from trimoe import calibration, checkpoint, errors, inspection, skeleton

        self.trimoe, self.calibration, self.Checkpoint, self.UserError = trimoe, calibration, checkpoint.Checkpoint, errors.UserError
        self.inspection, self.folder, self.seed = inspection, folder, seed
        self.models = {family: folder / family for family in FAMILIES}
        self.clean = {(name, path.name): path.read_bytes() for name, model in self.models.items() for path in model.iterdir()}
        self.skeletons = {name: skeleton.Skeleton.of(str(model)) for name, model in self.models.items()}

    def make(self, number: int) -> tuple[str, str, Path, bytes]:
        """(kind, family, file, its new content) of an input."""
        rng = random.Random(f"{self.seed}:{number}")
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        family = rng.choice(FAMILIES)
        name = {"header": SHARD, "bytes": SHARD, "recipe": "recipe.yaml"}.get(kind, kind)
        name = rng.choice(("tokenizer.json", "tokenizer_config.json")) if kind == "tokenizer" else name
        clean = self.clean.get((family, name), b"")
        if kind == "recipe":
            recipe = changed(rng.choice(RECIPES), rng)
            try:
                text = yaml.safe_dump(recipe).encode()
            except RecursionError:  # the deep ones; JSON is YAML too
                text = json.dumps(recipe).encode()
            content = torn(text, rng) if rng.random() < 0.3 else text
        elif kind == "header":
            content = mutated_shard(clean, rng)
        else:
            content = torn(clean, rng) if kind == "bytes" else mutated(clean, rng)
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
            str(self.trimoe.plan(str(model), RECIPES[0])).encode()
        else:
            about = self.trimoe.inspect(str(model))
            self.inspection.table(about).encode()
            return "read" if about["supported"] else f"refused: {about['reason']}"
        return "read"

    def run(self, number: int) -> tuple[str, str, str]:
        """(kind, outcome, detail) of one input; the file is as it was afterwards."""
        kind, family, path, content = self.make(number)
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(HARD_SECONDS, exit=True)
        try:
            outcome, detail = "read", self.use(kind, family, number)
        except self.UserError as error:
            outcome, detail = "refused", str(error)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "/trimoe/" in f.filename]
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            outcome, detail = (
                "slow" if isinstance(error, TimeoutError) else "crashed",
                f"{type(error).__name__} at {where}: {str(error)[:150]}",
            )
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        if detail.startswith("refused: "):
            outcome = "refused"
        if "\n" in detail and outcome == "refused":
            outcome, detail = "crashed", f"two lines: {detail[:150]!r}"
        if outcome == "refused" and "allocate" in detail:  # asked for, never filled, refused by the system
            outcome = "refused, too large"
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > GROWTH:
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

    for family in FAMILIES:
        families.save(family, folder / family, shard="120KB", dtype=torch.bfloat16)
        shards = sorted((folder / family).glob("*.safetensors"))
        assert len(shards) == 2, (family, shards)


def work(folder: Path, seed: int, numbers: range, until: float, keep: Path) -> None:
    """One process: lines of JSON on standard output, one an input that is of interest, and one with the counts at the end."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, late)
    bench = Bench(folder, seed)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    (folder / "count").write_text("{}")
    for done, number in enumerate(numbers, 1):
        if time.time() > until:
            break
        (folder / "at").write_text(str(number))
        kind, outcome, detail = bench.run(number)
        counts[f"{kind}: {outcome}"] += 1
        if done % 50 == 0:
            (folder / "count").write_text(json.dumps(counts))
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
        span = f"{rest.start}:{rest.stop}:{rest.step}"
        return subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--worker",
                str(folder),
                "--seed",
                str(seed),
                "--span",
                span,
                "--until",
                str(until),
                "--keep",
                str(keep),
            ],
            text=True,
        )

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
            waits.append(
                drive(
                    folder / str(process), given.seed, range(process, given.count, given.processes), began + 60 * given.minutes, given.keep
                )
            )
        total = sum((wait() for wait in waits), collections.Counter())
        took, count = time.time() - began, sum(total.values())
        for name, number in sorted(total.items()):
            print(f"{name:<50}{number:>9,}")
        print(f"{count:,} inputs in {took:.0f} s: {count / took:.0f} a second in {given.processes} processes")


if __name__ == "__main__":
    main()
