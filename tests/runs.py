"""What tests of whole runs share: a checkpoint's logits from the layer walk, and whether a run that stops in the middle goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import snapshot

import trimoe
from trimoe.model.skeleton import Skeleton
from trimoe.output.writer import Writer
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
