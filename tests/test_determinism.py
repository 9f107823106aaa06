"""The same inputs and seed give the same folder: in new processes, and, where decisions are all that is computed, on 1 and 2 threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import families
import pytest

from trimoe import decide

COMPRESS = """
import json, sys
import torch, trimoe
model, text, out, *recipes = sys.argv[1:]
for number, recipe in enumerate(recipes):
    value = json.loads(recipe) if recipe.startswith("{") else recipe
    trimoe.compress(model, value, f"{out}/{number}", calibration=[text], samples=4, length=32, command="same")
"""
LOG = "trimoe.log"  # tells the time
BY_DECISION = (
    '{"steps": [{"expert_drop": {"ratio": 0.25, "score": "reap", "search": "none"}}]}',
    '{"steps": [{"expert_drop": {"ratio": 0.25, "counts": "importance", "search": "greedy"}}]}',
    '{"steps": [{"layer_drop": {"count": 1}}]}',
    '{"steps": [{"quantize": {"bits": 4, "group": 32, "method": "round"}}]}',
    '{"steps": [{"weight_prune": {"ratio": 0.5, "score": "magnitude"}}]}',
    '{"steps": [{"weight_prune": {"ratio": 0.5, "score": "wanda"}}]}',
)


def made(model: Path, text: Path, out: Path, threads: int, recipes: tuple[str, ...]) -> dict[str, bytes]:
    """Every file of the compressions by `recipes` in a new process, but the log."""
    out.mkdir()
    words = [sys.executable, "-c", COMPRESS, str(model), str(text), str(out), *recipes]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if Path(name).name != LOG}


def same(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.slow
def test_one_and_two_threads_decide_alike(text_file: Path, tmp_path: Path) -> None:
    """Matrix products differ in their last bits; what is chosen, copied and rounded does not. Large enough that two threads are used."""
    families.save("mixtral", tmp_path / "model", hidden_size=256, intermediate_size=256, num_hidden_layers=2)
    first, again, two = (
        made(tmp_path / "model", text_file, tmp_path / name, threads, BY_DECISION)
        for name, threads in (("first", 1), ("again", 1), ("two", 2))
    )
    same(first, again)
    same(first, two)


@pytest.mark.slow
def test_floats_made_anew_are_the_same_twice(text_file: Path, tmp_path: Path) -> None:
    """Factors, fitted integers and training: equal in two processes of as many threads."""
    families.save("mixtral", tmp_path / "model", hidden_size=64, intermediate_size=64)
    recipes = (
        '{"steps": [{"expert_drop": {"ratio": 0.25, "search": "greedy"}}, {"low_rank": {"ratio": 0.3}}]}',
        '{"steps": [{"quantize": {"bits": 4, "group": 32}}]}',
        '{"steps": [{"weight_prune": {"ratio": 0.5, "score": "sparsegpt"}}]}',
        '{"steps": [{"expert_drop": {"ratio": 0.25, "search": {"genetic": {"population": 8, "generations": 3}}}}],'
        ' "recover": {"method": "router", "steps": 2, "batch": 2}}',
    )
    same(*(made(tmp_path / "model", text_file, tmp_path / name, 1, recipes) for name in ("first", "again")))


def test_reported_numbers_have_the_digits_that_threads_leave_alone() -> None:
    given = {"a": [0.123456789, 3], "b": {"c": 1234567.0, "d": float("inf"), "e": None, "f": True}, "g": (1e-30, "x")}
    assert decide.rounded(given) == {"a": [0.12346, 3], "b": {"c": 1234600.0, "d": float("inf"), "e": None, "f": True}, "g": [1e-30, "x"]}
