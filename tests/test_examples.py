"""What the documentation shows is run: every example in a process of its own, every recipe from plan to loaded model."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch

import trimoe
from trimoe import recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "examples").glob("*.sh")])
RECIPES = [*recipe.names(), *(str(path) for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml")))]
LONGEST = 40  # lines of an example
SECONDS = 90  # of one core that an example may take; the machine may be busy with other work, so not by the clock


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    if "trimoe report" in path.read_text(encoding="utf-8"):
        pytest.importorskip("altair")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "TRIMOE_CACHE": str(tmp_path / "hub"),
    }  # fmt: skip
    command = [sys.executable if path.suffix == ".py" else "bash", str(path), str(tmp_path / "out")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20 * SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) in (["hub", "out"], ["out"], ["out", "out.log"]), (
        "an example writes where it was told to"
    )


@pytest.fixture(scope="module")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many layers as an eighth of them needs."""
    folder = tmp_path_factory.mktemp("eight")
    families.save("mixtral", folder, num_hidden_layers=8)
    return folder


@pytest.mark.parametrize("name", RECIPES, ids=lambda name: Path(name).stem)
def test_recipes_run(name: str, eight_layers: Path, text_file: Path, tmp_path: Path) -> None:
    """The plan comes true, and the result computes numbers."""
    changes = []
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
