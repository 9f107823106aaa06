"""A method is one class in the registry: this one is planned, compressed with, resumed, carded, reported and reloaded, and no other line
of trimoe knows of it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from runs import IDS, check_resumes, streamed

import trimoe
from trimoe.methods import METHODS
from trimoe.methods.fitting import LayerFit
from trimoe.methods.lab import Lab
from trimoe.methods.method import Method, Outlined, Paper
from trimoe.model.decision import Decisions
from trimoe.model.expert import matrices
from trimoe.model.skeleton import Skeleton
from trimoe.report.build import report

ROOT = Path(trimoe.__file__).parent


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LastChannels(Method):
    """Set the last channels of every expert to zero."""

    name: ClassVar[str] = "last_channels"
    paper: ClassVar[str] = "none"
    label: ClassVar[str | None] = "Cut channels"
    mildest: ClassVar[dict[str, Any]] = {"ratio": 0.1}
    writes_computed: ClassVar[bool] = True

    ratio: Annotated[float, Field(gt=0, lt=1)]

    @property
    def reads_text(self) -> bool:
        return False

    def outline(self, paper: Paper) -> Outlined:
        return Outlined(self._zeros(paper))

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        return self._zeros(lab), {}

    def _zeros(self, model: Paper | Lab) -> Decisions:
        return {index: replace(model.decisions[index], sparsity=self.ratio) for index in model.sites}

    def fit(self, layer: LayerFit) -> tuple[Any, dict[str, Any]]:
        assert layer.part is not None
        part = layer.part
        kept = round(part.site.width * (1 - self.ratio))
        for expert in range(part.site.num_experts):
            w_in, w_out = matrices(part.experts, expert)
            w_in.unflatten(0, (-1, part.site.width))[:, kept:] = 0  # of gate and up, which lie one behind the other
            w_out[:, kept:] = 0
        part.complete()
        return None, {"zeros": 1 - kept / part.site.width}


def test_a_method_in_one_file(
    family_folder: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, LastChannels.name, LastChannels)
    source = str(family_folder("mixtral"))
    drop = {"expert_drop": {"ratio": 0.25, "counts": "uniform"}}
    recipe = {"steps": [drop, {"last_channels": {"ratio": 0.25}}]}

    def make(out: Path) -> trimoe.Result:
        return trimoe.compress(source, recipe, out, calibration=[str(text_file)], samples=8, length=32)

    assert trimoe.inspect(source)["methods"]["last_channels"] == "yes"
    with pytest.raises(trimoe.UserError, match="last_channels is fitted to the finished model, so it comes last"):
        trimoe.plan(source, {"steps": [*reversed(recipe["steps"])]})
    planned = trimoe.plan(source, recipe, calibration=[str(text_file)], samples=8, length=32)
    check_resumes(make, tmp_path, after=2)
    out = make(tmp_path / "out").out
    assert planned.bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned.form == "stock" and all(row["sparsity"] == 0.25 for row in planned.layers)
    assert "- `last_channels`: ratio 0.25" in (out / "README.md").read_text()
    page = report([out], tmp_path / "report.html")[0].read_text()
    assert "Zeros among the expert weights" in page and "last_channels" in page
    skeleton = Skeleton.of(str(out))
    model = trimoe.load(out)
    for index, site in skeleton.sites.items():
        experts = site.experts_of(model.get_submodule(skeleton.layer_name(index)))
        kept = round(site.width * 0.75)
        w_in, w_out = matrices(experts, 0)
        rows = w_in.unflatten(0, (-1, site.width))
        assert not w_out[:, kept:].any() and w_out[:, :kept].all() and not rows[:, kept:].any() and rows[:, :kept].all()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, streamed(out), atol=1e-4, rtol=1e-4)


def test_only_the_methods_name_a_method() -> None:
    classes = {method.__name__ for method in METHODS.values()}
    for path in (path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "methods"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {node.id} if isinstance(node, ast.Name) else {node.name} if isinstance(node, ast.alias) else set()
            assert not names & classes, f"{path.relative_to(ROOT)} names {names & classes}"


def test_a_method_that_leaves_something_out_cannot_be_configured() -> None:
    class Half(Method):
        name = paper = "half"

        def outline(self, paper: Paper) -> Outlined:
            return Outlined({})

    with pytest.raises(TypeError, match="decide"):
        Half()  # type: ignore[abstract]
