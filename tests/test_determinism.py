"""The same inputs and seed give the same folder: every built-in recipe, in new processes, and, where decisions are all that is computed, on
1 and 2 threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import trimoe
from trimoe.methods import lab
from trimoe.recipe import recipe

COMPRESS = """
import json, sys
import trimoe
text, out, *jobs = sys.argv[1:]
for number, job in enumerate(jobs):
    model, recipe = json.loads(job)
    trimoe.compress(model, recipe, f"{out}/{number}", calibration=[text], samples=4, length=32, command="same")
"""
LOG = "trimoe.log"  # tells the time
BY_DECISION: tuple[dict[str, Any], ...] = (
    {"steps": [{"expert_drop": {"ratio": 0.25, "score": "reap", "search": "none"}}]},
    {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "importance", "search": "greedy"}}]},
    {"steps": [{"layer_drop": {"count": 1}}]},
    {"steps": [{"quantize": {"bits": 4, "group": 32, "method": "round"}}]},
    {"steps": [{"weight_prune": {"ratio": 0.5, "score": "magnitude"}}]},
    {"steps": [{"weight_prune": {"ratio": 0.5, "score": "wanda"}}]},
)
COMPUTED: tuple[dict[str, Any], ...] = (
    {"steps": [{"expert_drop": {"ratio": 0.25, "search": "greedy"}}, {"low_rank": {"ratio": 0.3}}]},
    {"steps": [{"quantize": {"bits": 4, "group": 32}}]},
    {"steps": [{"weight_prune": {"ratio": 0.5, "score": "sparsegpt"}}]},
    {
        "steps": [{"expert_drop": {"ratio": 0.25, "search": {"genetic": {"population": 8, "generations": 3}}}}],
        "recover": {"method": "router", "steps": 2, "batch": 2},
    },
)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the logs."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if Path(name).name != LOG}


def made(jobs: Sequence[tuple[Path, dict[str, Any]]], text: Path, out: Path, threads: int) -> dict[str, bytes]:
    """Every file of compressions (model, recipe) in a new process, but the logs."""
    out.mkdir()
    words = [sys.executable, "-c", COMPRESS, str(text), str(out), *(json.dumps(job, default=str) for job in jobs)]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return files_of(out)


def same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_new_processes_make_the_same_folders(text_file: Path, tmp_path: Path) -> None:
    """With as many threads all bytes are equal: factors, fitted integers and training, too. With another number of threads matrix products
    differ in their last bits; what is chosen, copied and rounded does not. Large enough that two threads are used."""
    large, small = tmp_path / "large", tmp_path / "small"
    families.save("mixtral", large, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    families.save("mixtral", small, hidden_size=64, intermediate_size=64)
    decided, computed = [(large, recipe) for recipe in BY_DECISION], [(small, recipe) for recipe in COMPUTED]
    first, again = (made([*decided, *computed], text_file, tmp_path / name, 1) for name in ("first", "again"))
    same(first, again)
    two = made(decided, text_file, tmp_path / "two", 2)
    assert len(two) > 4 * len(decided)
    same({name: data for name, data in first.items() if int(Path(name).parts[0]) < len(decided)}, two)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_makes_the_same_folder_twice(name: str, eight_layers: Path, text_file: Path, tmp_path: Path, one_thread: None) -> None:
    """Training too, and the record: nothing in it tells the time or the place."""
    changes = [f"recover.{field}" for field in ("samples=8", "length=16", "steps=2", "epochs=1")] if recipe.load(name).recover else []
    for out in ("first", "again"):
        trimoe.compress(
            eight_layers, name, tmp_path / out, changes=changes, calibration=[str(text_file)], samples=4, length=16, command="same"
        )
    first = files_of(tmp_path / "first")
    assert {"config.json", "trimoe.json", "README.md"} <= first.keys() and any(file.endswith(".safetensors") for file in first)
    same(first, files_of(tmp_path / "again"))


def test_reported_numbers_have_the_digits_that_threads_leave_alone() -> None:
    given = {"a": [0.123456789, 3], "b": {"c": 1234567.0, "d": float("inf"), "e": None, "f": True}, "g": (1e-30, "x")}
    assert lab.rounded(given) == {"a": [0.12346, 3], "b": {"c": 1234600.0, "d": float("inf"), "e": None, "f": True}, "g": [1e-30, "x"]}
