"""What the documentation shows is run: every example in a process of its own, every recipe from plan to loaded model."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trimoe
from trimoe.recipe import recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.sh")])
RECIPES = [*recipe.names(), *(str(path) for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")))]
LONGEST = 40  # lines of an example
SECONDS = 90  # of one core that an example may take; the machine may be busy with other work, so not by the clock


# Runs Python scripts, each in a process of its own, forked from one that has only imported: a start then costs milliseconds, not seconds.
FORKS = """
import json, os, runpy, sys
import trimoe
for line in sys.stdin:
    script, folder, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.dup2(os.open(folder + ".stderr", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        os.environ["TRIMOE_CACHE"] = folder + ".cache"
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    _, status, used = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime]), flush=True)
"""
Run = Callable[[Path, Path], tuple[int, float, str]]  # script and folder -> exit code, seconds of one core, errors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub")),
    }  # fmt: skip
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    server: list[subprocess.Popen[str]] = []

    def by_python(script: Path, folder: Path) -> tuple[int, float, str]:
        if not server:
            server.append(subprocess.Popen([sys.executable, "-c", FORKS], **pipes))
        assert server[0].stdin is not None and server[0].stdout is not None
        print(json.dumps([str(script), str(folder), str(folder / "out")]), file=server[0].stdin, flush=True)
        code, seconds = json.loads(server[0].stdout.readline())
        return code, seconds, Path(f"{folder}.stderr").read_text(encoding="utf-8")

    def by_shell(script: Path, folder: Path) -> tuple[int, float, str]:
        own = {**environment, "TRIMOE_CACHE": f"{folder}.cache"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(["bash", str(script), str(folder / "out")], cwd=folder, env=own, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return done.returncode, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr

    yield lambda script, folder: (by_python if script.suffix == ".py" else by_shell)(script, folder)
    for process in server:
        process.communicate()


@pytest.mark.slow
@pytest.mark.xdist_group("examples")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, run: Run, tmp_path: Path) -> None:
    if "trimoe report" in path.read_text(encoding="utf-8"):
        pytest.importorskip("altair")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    folder = tmp_path / "here"
    folder.mkdir()
    code, seconds, said = run(path, folder)
    assert code == 0 and "Traceback" not in said, said
    assert seconds < SECONDS
    assert {entry.name for entry in folder.iterdir()} - {"out.log"} == {"out"}, "an example writes where it was told to"


@pytest.mark.parametrize("name", RECIPES, ids=lambda name: Path(name).stem)
def test_recipes_run(name: str, eight_layers: Path, text_file: Path, tmp_path: Path) -> None:
    """The plan comes true, and the result computes numbers, in the time that an example may take."""
    changes, start = [], time.process_time()
    if recipe.load(name).recover is not None:
        changes = ["recover.samples=8", "recover.length=16", "recover.steps=2", "recover.epochs=1"]
    options = {"changes": changes, "samples": 8, "length": 16}
    planned = trimoe.plan(eight_layers, name, **options)  # type: ignore[arg-type]
    result = trimoe.compress(eight_layers, name, tmp_path / "out", calibration=[str(text_file)], **options)  # type: ignore[arg-type]
    assert planned.bytes in (None, result.plan.bytes)
    assert sum(path.stat().st_size for path in result.out.glob("*.safetensors")) == result.plan.bytes
    with torch.inference_mode():
        logits = trimoe.load(result.out, dtype="float32")(torch.arange(16)[None]).logits
    assert logits.shape[:2] == (1, 16)
    assert torch.isfinite(logits).all()
    assert time.process_time() - start < SECONDS
