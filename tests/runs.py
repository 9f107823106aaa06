"""What tests of whole runs share: a checkpoint's logits from the layer walk, and whether a run that stops in the middle goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import snapshot

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.output.writer import Writer
from trimoe.recipe import recipe as recipes
from trimoe.walk.walk import LayerWalk

IDS = torch.arange(3, 35).view(2, 16)


def streamed(folder: Path) -> torch.Tensor:
    """Logits of IDS; packed experts are read as the dense ones they stand for."""
    walk = LayerWalk(Skeleton.of(str(folder)), [IDS])
    for index in range(len(walk)):
        with walk.layer(index) as layer:
            walk.advance(index, layer)
    with walk.head() as head:
        return head(walk.hidden[0], 0)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(recipe: str) -> dict[str, Any]:
    """Options by which a whole recipe, its training included, is done in a second or two."""
    changes = ["recover.samples=8", "recover.length=16", "recover.steps=2", "recover.epochs=1"]
    return {"changes": changes if recipes.load(recipe).recover else [], "samples": 8, "length": 16}


def compress_by(recipe: str, source: Path, text: Path, out: Path) -> trimoe.Result:
    with one_thread():
        return trimoe.compress(source, recipe, out, calibration=[str(text)], command="same", **small(recipe))


def one_worker(names: list[str]) -> list[Any]:
    """Recipes, each with a mark by which all its tests share a worker, so that it is compressed once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(f"recipe {Path(name).stem}"), id=Path(name).stem) for name in names]


def check_resumes(make: Callable[[Path], trimoe.Result], folder: Path, after: int) -> None:
    """A run into shards of one layer each that stops before the group of tensors `after`, as when the power goes, and is begun again,
    writes what an uninterrupted one does."""
    put = Writer.put

    def cut(self: Writer, group: int, made: Any = None) -> None:
        if group == after:
            raise RuntimeError("power cut")
        put(self, group, made)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimoe.output.layout.MAX_SHARD", 1)
        whole = make(folder / "whole")
        patch.setattr(Writer, "put", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            make(folder / "cut")
        patch.setattr(Writer, "put", put)
        resumed = make(folder / "cut")
    assert snapshot(folder / "cut") == snapshot(folder / "whole")
    assert json.dumps(resumed.metrics) == json.dumps(whole.metrics)
