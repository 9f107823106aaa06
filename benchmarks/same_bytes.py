"""Hash the folders that every built-in recipe makes, and compare the hashes with those of another checkout.

    python benchmarks/same_bytes.py --json before.json                         # hashes of this checkout
    python benchmarks/same_bytes.py --against before.json                      # exit code 1 where a byte differs
    python benchmarks/same_bytes.py --recipes moe-i2,wanda --ways whole        # some of them only

Ways: `whole` is one uninterrupted run, `killed` one that got SIGKILL after a half of that run's time and was started again, `two` one by
two processes. Models are small and random: this script says whether a change of the code changed a result, nothing about quality. Each run
is forked from this process, so that it starts in milliseconds. trimoe.log, which tells the time, is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import random_model
import torch
from transformers import PreTrainedModel  # noqa: F401 (imported before the forks, not in each of them)

import trimoe

WAYS = ("whole", "killed", "two")
HERE = Path.cwd()
WORDS = 8000
RECIPES = Path(trimoe.__file__).parent / "recipes"
TRAINING = ("samples=8", "length=16", "steps=2", "epochs=1")
MORE: dict[str, dict[str, Any]] = {
    "global-reap": {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "global", "score": "reap", "search": "none"}}]},
    "bitmask": {"steps": [{"weight_prune": {"ratio": 0.5, "form": "bitmask", "scope": "all-linear"}}]},
    "gptq-all-linear": {"steps": [{"quantize": {"bits": 4, "group": 32, "scope": "all-linear"}}]},
    "rerank": {"steps": [{"layer_drop": {"ratio": 0.34, "rerank": "kl"}}]},
    "dense-factors": {"steps": [{"low_rank": {"ratio": 0.3, "form": "dense"}}, {"weight_prune": {"pattern": "2:4"}}]},
}


def make(model: Path, text: Path, name: str, out: Path) -> None:
    """Compress with small calibration, as this process or as one of a team."""
    changes = [f"recover.{change}" for change in TRAINING] if _trains(name) else []
    trimoe.compress(str(model), MORE.get(name, name), out, changes=changes, calibration=[str(text)], samples=80, length=64, command="same")


def _trains(name: str) -> bool:
    return name not in MORE and "\nrecover:" in (RECIPES / f"{name}.yaml").read_text()


def forked(work: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """The number of a new process that does `work` and ends."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment or {})
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def waited(child: int, what: str) -> None:
    if (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) != 0:
        raise SystemExit(f"{what} ended with {code}.")


def whole(work: Callable[[], None], seconds: float) -> None:
    waited(forked(work), "a run")


def killed(work: Callable[[], None], seconds: float) -> None:
    child = forked(work)
    time.sleep(seconds / 2)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    waited(forked(work), "a resumed run")


def two(work: Callable[[], None], seconds: float) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "same"}
    children = [forked(work, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for child in children:
        waited(child, "one of two processes")


def hashed(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the log, by its path in the folder. The record names the model's folder, which another run has elsewhere."""
    here = str(folder.parent).encode()
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "trimoe.log")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes().replace(here, b"")).hexdigest() for path in files}


def sources(folder: Path) -> tuple[Path, Path]:
    """A small random model and a text for it."""
    model, text = folder / "model", folder / "text.txt"
    model.mkdir()
    random_model.save(random_model.config_of(layers=8, experts=8, hidden=64, width=32, top_k=2, vocabulary=96, context=64), model)
    dice = random.Random(0)
    text.write_text(" ".join("".join(dice.choices("etaoinshrdlu", k=dice.randint(1, 8))) for _ in range(WORDS)))
    return Path(model.name), Path(text.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*sorted(path.stem for path in RECIPES.glob("*.yaml")), *MORE]
    parser.add_argument("--recipes", help="comma between; all built-in ones and a few more by default")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", metavar="FILE", help="write the hashes")
    parser.add_argument("--against", metavar="FILE", help="compare with the hashes in FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as scratch:
        place = Path(scratch)
        model, text = sources(place)
        os.chdir(place)
        for name in options.recipes.split(",") if options.recipes else names:
            start = time.monotonic()
            seconds = 1.0
            for way in options.ways.split(","):
                if way == "two" and _trains(name):
                    continue  # a recipe with recover runs in one process
                out = place / "out"

                def work(name: str = name, out: Path = out) -> None:
                    make(model, text, name, out.relative_to(place))

                {"whole": whole, "killed": killed, "two": two}[way](work, seconds)
                seconds = time.monotonic() - start if way == "whole" else seconds
                found[f"{name} {way}"] = hashed(out)
                out.rename(place / f"{name}-{way}")
            print(f"{name}: {time.monotonic() - start:.1f} s", flush=True)
    if options.json:
        Path(HERE, options.json).write_text(json.dumps(found, indent=1) + "\n")
    if not options.against:
        return 0
    before = json.loads(Path(HERE, options.against).read_text())
    wrong = 0
    for run, files in found.items():
        if differ := sorted(name for name in files.keys() | before[run].keys() if files.get(name) != before[run].get(name)):
            wrong += 1
            print(f"{run}: {', '.join(differ)} differ")
    print(f"{len(found) - wrong} of {len(found)} folders are the same.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
