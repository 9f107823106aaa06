"""Whole runs killed at any moment and started again: do they end in the same bytes?

    python benchmarks/kills.py --kills 50             # seeded random moments: of the clock, and of the calls that change the disk
    python benchmarks/kills.py --every                # before and after each single call that changes the disk
    python benchmarks/kills.py --cases lora,experts   # some of the runs only
    python benchmarks/kills.py --threads 2            # no kills: is the folder the same on two threads as on one?

Every run is a process of its own that executes the real command line on a tiny random model. It is forked from this one, which has only
imported: a start then costs milliseconds, not seconds. SIGKILL comes from outside after a random share of the measured duration, or the
process sends it to itself around its N-th rename, removal, flush to disk or new folder, which hits the windows between them. The command is
then repeated, up to twice killed again, until it is done, and its folder is compared byte for byte with that of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel  # noqa: F401 (imported before the forks, not in each of them)

from trimoe import cli, progress
from trimoe.journal import Journal
from trimoe.output import layout, rewriter, writer
from trimoe.recipe import recipe
from trimoe.recover import loop
from trimoe.recover import run as recovery

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import families

CHANGES = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")  # calls of os after each of which the disk looks different
IN_A_ROW = 3
SHARD = 30_000  # bytes: a tiny model is then written in several shards

SMALL = {"data": "letters.txt", "samples": 24, "length": 32, "batch": 4, "holdout": 0.2, "rank": 4, "rate": 3e-3}
UNIFORM = {"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}
MOE_I2 = [
    {"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": {"genetic": {"population": 12, "generations": 6}}, "receptive_field": {"k": 2, "t": 2}}},
    {"low_rank": {"ratio": 0.333, "rank": "optimal", "whiten": "input"}},
]  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "moe-i2": {"steps": MOE_I2},
    "gptq": {"steps": [UNIFORM, {"quantize": {"bits": 4, "group": 8, "scope": "all-linear"}}]},
    "bitmask": {"steps": [{"weight_prune": {"ratio": 0.5, "form": "bitmask", "scope": "all-linear"}}]},
    "layer-drop": {"steps": [{"layer_drop": {"ratio": 0.34, "rerank": "kl"}}]},
    "copy": {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "score": "frequency", "search": "none"}}]},
    "recipe-recover": {"steps": MOE_I2, "recover": {"method": "logits", **SMALL}},
}
TRAINING = ["--data", "letters.txt", "--samples", "24", "--length", "32", "--set", "batch=4", "--set", "rank=4", "--set", "holdout=0.2"]
RECOVERIES: dict[str, list[str]] = {
    "lora": ["--method", "lora", "--epochs", "2"],
    "logits": ["--method", "logits", "--set", "train=full"],
    "experts": ["--method", "experts"],
    "adapter": ["--method", "logits", "--adapter"],
}
CASES = [*RECIPES, *RECOVERIES]


def command(case: str) -> list[str]:
    """The same words in every folder that a run is started in: they end up in trimoe.json."""
    if case in RECOVERIES:
        return ["trimoe", "recover", "../made", "-o", "out", "-q", *TRAINING, *RECOVERIES[case]]
    words = ["-c", "letters.txt", "--samples", "6", "--length", "32", "-q"]
    return ["trimoe", "compress", "../source", "-r", f"../{case}.yaml", "-o", "out", *words]


# ---- inside the process that is killed


class Watch:
    """Memory that the killed process leaves behind: its stage, and how many calls have changed the disk."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def stage(self, name: str) -> None:
        self.memory[8:72] = name.encode()[:64].ljust(64)

    def count(self, number: int) -> None:
        self.memory[:8] = number.to_bytes(8, "little")

    def read(self) -> tuple[str, int]:
        return self.memory[8:72].decode().strip("\0 ") or "start", int.from_bytes(self.memory[:8], "little")


def _announce(watch: Watch, owner: Any, name: str, stage: str | None = None) -> None:
    """Note the stage on every call of owner.name: a given one, or the progress label."""
    real = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        watch.stage(stage or (args[2] if len(args) > 2 else kwargs["label"]))
        return real(*args, **kwargs)

    setattr(owner, name, noted)


def _dying(watch: Watch, at: int | None) -> None:
    """Die before (even `at`) or after (odd) a call that changes the disk."""
    done = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if at == 2 * done:
                os.kill(os.getpid(), signal.SIGKILL)
            given = real(*args, **kwargs)
            if at == 2 * done + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            watch.count(done)
            return given

        return call

    for name in CHANGES:
        setattr(os, name, wrap(getattr(os, name)))


def _child(folder: Path, words: list[str], watch: Watch, at: int | None, threads: int) -> None:
    os.chdir(folder)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    layout.MAX_SHARD, loop.SAVE_EVERY, sys.argv = SHARD, 0.0, words
    _announce(watch, progress.Reporter, "track")
    _announce(watch, loop.Training, "__init__", "load for training")
    _announce(watch, loop.Training, "run", "train")
    _announce(watch, writer.Writer, "finish", "last files")
    _announce(watch, rewriter.Rewriter, "begin", "copy")
    _announce(watch, rewriter.Rewriter, "put", "put")
    _announce(watch, rewriter.Rewriter, "finish", "last renames")
    _announce(watch, recovery.adapters, "save", "save adapter")
    _announce(watch, Journal, "close", "tidy up")
    _dying(watch, at)
    cli.main()


def forked(job: Callable[[], Any]) -> int:
    """The process id of a copy of this process that does `job` and ends."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        job()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


# ---- outside


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run: what it wrote, how long it took, how often it changed the disk."""

    files: dict[str, str]
    seconds: float
    changes: int


@dataclass(frozen=True)
class Attempt:
    code: int | None  # None: killed
    seconds: float
    stage: str
    changes: int


def attempt(folder: Path, words: list[str], *, after: float | None = None, at: int | None = None, threads: int = 1) -> Attempt:
    """Run once, killed `after` seconds or around a change of the disk."""
    watch, begun = Watch(), time.monotonic()
    process = forked(lambda: _child(folder, words, watch, at, threads))
    status = None
    while status is None:
        ended, code = os.waitpid(process, os.WNOHANG)
        if ended:
            status = code
        elif after is not None and time.monotonic() - begun >= after:
            os.kill(process, signal.SIGKILL)
            after = None
        else:
            time.sleep(0.002)
    stage, changes = watch.read()
    killed = os.WIFSIGNALED(status)
    assert not killed or os.WTERMSIG(status) == signal.SIGKILL, (folder / "log").read_text()
    return Attempt(None if killed else os.WEXITSTATUS(status), time.monotonic() - begun, stage, changes)


def snapshot(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != progress.LOG]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def place(work: Path, name: str) -> Path:
    """A folder to start a command in."""
    folder = work / name
    folder.mkdir()
    shutil.copy(work / "letters.txt", folder)
    return folder


def finished(folder: Path, words: list[str], **options: Any) -> Attempt:
    done = attempt(folder, words, **options)
    assert done.code == 0, (folder / "log").read_text()
    return done


def prepare(work: Path, family: str) -> None:
    """The tiny model, the text, the recipes and the folder that is trained."""
    generator = random.Random(0)
    (work / "letters.txt").write_text("".join(generator.choice(string.ascii_lowercase + "    ,.") for _ in range(4000)), encoding="utf-8")
    _, status = os.waitpid(forked(lambda: (torch.set_num_threads(1), families.save(family, work / "source"))), 0)
    assert status == 0
    for name, body in RECIPES.items():
        recipe.load(body)
        (work / f"{name}.yaml").write_text(json.dumps(body))
    (work / "made.yaml").write_text(json.dumps({"steps": [UNIFORM, {"low_rank": {"ratio": 0.4}}]}))
    folder = place(work, "making")
    finished(folder, command("made"))
    (folder / "out").rename(work / "made")


def on_threads(work: Path, case: str, threads: int) -> str:
    """What differs between one thread and more, among the tensors first of all."""
    found = []
    for count in (1, threads):
        folder = place(work, f"{case}-threads-{count}")
        finished(folder, command(case), threads=count)
        found.append(snapshot(folder / "out"))
    return ", ".join(differing(*found)) or "nothing"


def whole(work: Path, case: str) -> Whole:
    """The second of two runs is timed; both must agree, else kills would prove nothing."""
    found, done = [], None
    for number in (1, 2):
        folder = place(work, f"{case}-whole-{number}")
        done = finished(folder, command(case))
        found.append(snapshot(folder / "out"))
    assert done is not None and found[0] == found[1], f"{case} differs without a kill: {differing(*found)}"
    return Whole(found[0], done.seconds, done.changes)


def differing(a: dict[str, str], b: dict[str, str]) -> list[str]:
    return sorted(name for name in {*a, *b} if a.get(name) != b.get(name))


Moment = dict[str, Any]


def moments(whole: Whole, generator: random.Random) -> list[Moment]:
    """When one run and its repetitions are killed. Late in a repetition is early in the rest of the work."""
    times = generator.choice((1, 1, 2, IN_A_ROW))
    by_clock = generator.random() < 0.5
    if by_clock:
        return [{"after": generator.uniform(0.02, 1.0) * whole.seconds} for _ in range(times)]
    return [{"at": generator.randrange(2 * whole.changes)}, *({"at": generator.randrange(whole.changes)} for _ in range(times - 1))]


def killed(work: Path, case: str, moments: list[Moment], expected: Whole, name: str) -> tuple[list[str], str | None]:
    """The stages in which the kills came, and what is wrong in the end."""
    folder, stages = place(work, name), []
    for moment in moments:
        tried = attempt(folder, command(case), **moment)
        if tried.code is not None:
            if tried.code:
                return stages, f"exit {tried.code}: {(folder / 'log').read_text()[-600:]}"
            break
        stages.append(f"{tried.stage} ({'change' if 'at' in moment else 'clock'})")
    last = attempt(folder, command(case))
    if last.code:
        return stages, f"exit {last.code}: {(folder / 'log').read_text()[-600:]}"
    wrong = differing(snapshot(folder / "out"), expected.files)
    if not wrong:
        shutil.rmtree(folder)
    return stages, f"differs: {', '.join(wrong)} ({folder})" if wrong else None


def table(rows: dict[tuple[str, str], list[int]]) -> str:
    lines = [f"{'run':<16}{'killed in':<44}{'kills':>6}{'wrong':>7}"]
    lines += [f"{case:<16}{stage:<44}{kills:>6}{wrong:>7}" for (case, stage), (kills, wrong) in sorted(rows.items())]
    total, wrong = (sum(row[column] for row in rows.values()) for column in (0, 1))
    return "\n".join([*lines, f"{'all':<60}{total:>6}{wrong:>7}"])


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=50, help="at least so many")
    arguments.add_argument("--every", action="store_true", help="before and after every change of the disk, once each, instead")
    arguments.add_argument("--cases", default=",".join(CASES), help="which runs, separated by commas")
    arguments.add_argument("--family", default="mixtral", choices=sorted(families.FAMILIES))
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, help="compare with runs on so many threads, and kill nothing")
    arguments.add_argument("--work", type=Path, help="an empty folder to keep what went wrong; a temporary one otherwise")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        prepare(work, options.family)
        cases = options.cases.split(",")
        if options.threads:
            for case in cases:
                print(f"{case:<16}on 1 and {options.threads} threads differs: {on_threads(work, case, options.threads)}", flush=True)
            return 0
        wholes = {case: whole(work, case) for case in cases}
        print(f"family {options.family}, seed {options.seed}")
        print("\n".join(f"{case:<16}{one.seconds:5.1f} s, {one.changes} changes of the disk" for case, one in wholes.items()), flush=True)
        rows: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
        with contextlib.suppress(KeyboardInterrupt):  # the table so far
            kill_all(work, wholes, rows, options)
    print(table(rows))
    return int(any(wrong for _, wrong in rows.values()))


def kill_all(work: Path, wholes: dict[str, Whole], rows: dict[tuple[str, str], list[int]], options: argparse.Namespace) -> None:
    for number, (case, when) in enumerate(plans(wholes, options)):
        stages, wrong = killed(work, case, when, wholes[case], f"{case}-{number}")
        for stage in stages:
            rows[case, stage][0] += 1
            rows[case, stage][1] += wrong is not None
        if wrong:
            print(f"{case}, {when}, killed in {stages}: {wrong}", flush=True)
        if not options.every and sum(kills for kills, _ in rows.values()) >= options.kills:
            return


def plans(wholes: dict[str, Whole], options: argparse.Namespace) -> Iterator[tuple[str, list[Moment]]]:
    """Case and moments of one run after the other."""
    if options.every:
        yield from ((case, [{"at": at}]) for case, whole in wholes.items() for at in range(2 * whole.changes))
        return
    generator = random.Random(options.seed)
    while True:
        yield from ((case, moments(whole, generator)) for case, whole in wholes.items())


if __name__ == "__main__":
    sys.exit(main())
