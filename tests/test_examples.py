"""What the documentation shows is run: every example in a process of its own, every recipe from plan to loaded model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forks import Forks
from runs import one_worker, small

import trimoe
from trimoe.recipe import recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.sh")])
RECIPES = [*recipe.names(), *(str(path) for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")))]
LONGEST = 40  # lines of an example


Run = Callable[[Path, Path], "subprocess.CompletedProcess[str]"]  # a script and the folder to run it in


@pytest.fixture(scope="module")
def run(with_trimoe: Forks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Python's examples are forked; the shell's start everything anew, `trimoe` and torchrun."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path_factory.mktemp("hub"))

    def started(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        cache = f"{folder}.cache"
        if script.suffix == ".py":
            return with_trimoe.run(script, folder / "out", cwd=folder, TRIMOE_CACHE=cache)
        words = ["bash", script, folder / "out"]
        return subprocess.run(words, cwd=folder, env={**environment, "TRIMOE_CACHE": cache}, capture_output=True, text=True)

    return started


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, run: Run, tmp_path: Path) -> None:
    if "trimoe report" in path.read_text(encoding="utf-8"):
        pytest.importorskip("altair")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    folder = tmp_path / "here"
    folder.mkdir()
    done = run(path, folder)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {entry.name for entry in folder.iterdir()} - {"out.log"} == {"out"}, "an example writes where it was told to"


@pytest.mark.parametrize("name", one_worker(RECIPES))
def test_recipes_run(name: str, eight_layers: Path, compressed_by: Callable[[str], trimoe.Result]) -> None:
    """The plan comes true, and the result computes numbers."""
    planned, result = trimoe.plan(eight_layers, name, **small(name)), compressed_by(name)
    assert planned.bytes in (None, result.plan.bytes)
    assert sum(path.stat().st_size for path in result.out.glob("*.safetensors")) == result.plan.bytes
    with torch.inference_mode():
        logits = trimoe.load(result.out, dtype="float32")(torch.arange(16)[None]).logits
    assert logits.shape[:2] == (1, 16)
    assert torch.isfinite(logits).all()
