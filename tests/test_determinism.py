"""The same inputs and seed give the same folder: every built-in recipe, in new processes, and, where decisions are all that is computed, on
1 and 2 threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
from forks import Forks
from runs import compress_by, one_worker

import trimoe
from trimoe.methods import lab
from trimoe.recipe import recipe

COMPRESS = """
import json, sys
import torch, trimoe
threads, text, out, *jobs = sys.argv[1:]
torch.set_num_threads(int(threads))
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


def same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_new_processes_make_the_same_folders(text_file: Path, with_trimoe: Forks, tmp_path: Path) -> None:
    """With as many threads all bytes are equal: factors, fitted integers and training, too. With another number of threads matrix products
    differ in their last bits; what is chosen, copied and rounded does not. Large enough that two threads are used. One of the processes has
    a hash seed of its own."""
    large, small = tmp_path / "large", tmp_path / "small"
    families.save("mixtral", large, hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    families.save("mixtral", small, hidden_size=64, intermediate_size=64)
    decided = [json.dumps([str(large), recipe]) for recipe in BY_DECISION]
    computed = [json.dumps([str(small), recipe]) for recipe in COMPUTED]

    def words(threads: str, name: str, jobs: list[str]) -> list[str]:
        return ["-c", COMPRESS, threads, str(text_file), str(tmp_path / name), *jobs]

    anew = [sys.executable, *words("1", "anew", [*decided, *computed])]
    ran = [
        with_trimoe.run(*words("1", "one", [*decided, *computed])), with_trimoe.run(*words("2", "two", decided)),
        subprocess.run(anew, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}, capture_output=True, text=True),
    ]  # fmt: skip
    assert not any(done.returncode for done in ran), [done.stderr[-2000:] for done in ran]
    one, two, other = (files_of(tmp_path / name) for name in ("one", "two", "anew"))
    same(one, other)
    assert len(two) > 4 * len(decided)
    same({name: data for name, data in one.items() if int(Path(name).parts[0]) < len(decided)}, two)


@pytest.mark.slow
@pytest.mark.parametrize("name", one_worker(recipe.names()))
def test_every_recipe_makes_the_same_folder_twice(
    name: str, eight_layers: Path, text_file: Path, compressed_by: Callable[[str], trimoe.Result], tmp_path: Path
) -> None:
    """Training too, and the record: nothing in it tells the time or the place."""
    first = files_of(compressed_by(name).out)
    assert {"config.json", "trimoe.json", "README.md"} <= first.keys() and any(file.endswith(".safetensors") for file in first)
    same(first, files_of(compress_by(name, eight_layers, text_file, tmp_path / "again").out))


def test_reported_numbers_have_the_digits_that_threads_leave_alone() -> None:
    given = {"a": [0.123456789, 3], "b": {"c": 1234567.0, "d": float("inf"), "e": None, "f": True}, "g": (1e-30, "x")}
    assert lab.rounded(given) == {"a": [0.12346, 3], "b": {"c": 1234600.0, "d": float("inf"), "e": None, "f": True}, "g": [1e-30, "x"]}
