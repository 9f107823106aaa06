"""Writes a finished checkpoint: shards, index, configuration, tokenizer. Every file is written aside, flushed to disk and renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trimoe import modeling_trimoe
from trimoe.checkpoint.atomic import aside, copy_file, disk_errors, write_text
from trimoe.checkpoint.headers import DTYPES
from trimoe.checkpoint.shards import INDEX
from trimoe.output.layout import Entry, Layout, Shard

PIECE = 64 << 20  # bytes copied at a time


class Writer:
    """Takes groups in order, fills the shards they belong to, and renames each shard when it is complete.

    A shard that is already there (a resumed run) is left alone; `done(group)` tells.
    """

    def __init__(self, layout: Layout, out: Path):
        self.layout, self.out, self.source = layout, out, layout.skeleton.checkpoint
        self._open: tuple[Shard, Any, dict[str, int]] | None = None

    def shard_of(self, group: int) -> Shard:
        return next(shard for shard in self.layout.shards if group in shard.groups)

    def done(self, group: int) -> bool:
        return (self.out / self.shard_of(group).name).is_file()

    def put(self, group: int, made: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write one group: copies from the source, and the tensors that a transformation made (by disk key)."""
        shard = self.shard_of(group)
        if self.done(group):
            return
        with disk_errors(self.out / shard.name):
            self._fill(shard, group, made)

    def _fill(self, shard: Shard, group: int, made: Mapping[str, torch.Tensor] | None) -> None:
        if self._open is None:
            file = open(self.out / (shard.name + ".part"), "wb")  # noqa: SIM115 (kept open over several groups)
            file.write(shard.header)
            file.truncate(shard.nbytes)
            self._open = (shard, file, shard.offsets())
        assert self._open[0].name == shard.name, "groups come in order"
        _, file, offsets = self._open
        for entry in self.layout.groups[group]:
            file.seek(offsets[entry.key])
            if entry.zeros:
                file.write(bytes(entry.nbytes))
            elif entry.source is not None:
                self._copy(entry, file)
            else:
                assert made is not None, entry.key
                tensor = made[entry.key]
                assert tensor.shape == entry.shape, (entry, tensor.shape)
                _write_tensor(file, tensor.detach().to("cpu", DTYPES[entry.dtype]))
        if group == shard.groups[-1]:
            file.close()
            with aside(self.out / shard.name):
                self._open = None

    def _copy(self, entry: Entry, file: Any) -> None:
        assert entry.source is not None
        if entry.axis is not None:
            tensor = self.source.read(entry.source)
            _write_tensor(file, tensor.index_select(entry.axis, torch.tensor(entry.keep)))
            return
        info = self.source.tensors[entry.source]
        with open(self.source.folder / info.file, "rb") as source:
            source.seek(info.start)
            left = info.nbytes
            while left:
                piece = source.read(min(PIECE, left))
                assert piece, f"{info.file} shrank while it was read"
                file.write(piece)
                left -= len(piece)

    def finish(self, side: Mapping[str, str]) -> None:
        """Index, configuration, everything beside the source's weights, loader code for native checkpoints, and `side` files (name -> text)."""
        layout = self.layout
        write_text(self.out / INDEX, json.dumps(layout.index_json(), indent=2) + "\n")
        for name in self.source.side_files():
            if name not in side:
                copy_file(self.source.folder / name, self.out / name)
        if layout.native:
            copy_file(Path(modeling_trimoe.__file__), self.out / "modeling_trimoe.py")
        for name, text in side.items():
            write_text(self.out / name, text)
        # config.json last: a folder without it is not a model to anybody
        write_text(self.out / "config.json", json.dumps(layout.config, indent=2, ensure_ascii=False) + "\n")


def _write_tensor(file: Any, tensor: torch.Tensor) -> None:
    if tensor.numel():
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
