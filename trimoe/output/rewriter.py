"""The same checkpoint with other numbers: a finished folder is copied, and tensors get new values of the same shape and dtype in place.

Everything the headers say stays as it is, so that no name, offset or file size changes. The folder that is copied is never written to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from trimoe.checkpoint.atomic import copy_file, disk_errors, write_text
from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.headers import DTYPES, TensorInfo
from trimoe.checkpoint.shards import INDEX
from trimoe.checkpoint.side_files import is_weights
from trimoe.checkpoint.whole import PAGE
from trimoe.errors import Diverged
from trimoe.progress import LOG

CONFIG = "config.json"


class Rewriter:
    """A copy of a finished folder in which some tensors get other values of the same shape and dtype.

    A killed run goes on: shards that are copied or even renamed already are taken as they are, and whatever is put twice is written twice.
    """

    def __init__(self, source: Checkpoint, out: Path):
        assert source.folder.resolve() != out.resolve(), "the source is never written to"
        self.source, self.out = source, out

    def begin(self) -> None:
        """Copy every shard to OUT/NAME.part, unless it is there."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in self.source.files():
            size = os.path.getsize(self.source.folder / name)
            path = self._path(name)
            if not path.is_file() or os.path.getsize(path) != size:
                copy_file(self.source.folder / name, self.out / f"{name}.part")  # itself written aside: what bears the name is whole

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """New values by disk key, cast to the stored dtypes; of tensors whose zeros are left out, the dense ones. Raises RuntimeError where one
        is not finite then."""
        cast = {key: self._cast(key, tensor) for key, tensor in tensors.items()}
        for name in sorted({self._info(key).file for key in cast}):
            with disk_errors(self.out / name), open(self._path(name), "r+b") as file:
                for key, tensor in cast.items():
                    if self._info(key).file == name and tensor.numel():
                        file.seek(self._info(key).start)
                        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())

    def read(self, key: str) -> torch.Tensor:
        """What the copy holds now."""
        info = self._info(key)
        with open(self._path(info.file), "rb") as file:
            file.seek(info.start)
            raw = bytearray(file.read(info.nbytes))
        assert len(raw) == info.nbytes, f"{info.file} ends inside {key}"
        dtype = DTYPES[info.dtype]
        return torch.frombuffer(raw, dtype=dtype).view(info.shape) if raw else torch.empty(info.shape, dtype=dtype)

    def finish(self, side: Mapping[str, str]) -> None:
        """Rename the shards, carry over whatever else lies in the source folder but what was said of it, and write `side` files (name ->
        text); config.json last."""
        for name in self.source.files():
            if not (self.out / name).is_file():
                os.replace(self.out / f"{name}.part", self.out / name)
        here = [path.name for path in self.source.folder.iterdir() if path.is_file() and (path.name == INDEX or not is_weights(path.name))]
        for name in sorted({*here, *self.source.side_files()}):
            if name not in (CONFIG, LOG, PAGE, *side):
                copy_file(self.source.folder / name, self.out / name)
        for name, text in side.items():
            if name != CONFIG:
                write_text(self.out / name, text)
        # config.json last: a folder without it is not a model to anybody
        if CONFIG in side:
            write_text(self.out / CONFIG, side[CONFIG])
        else:
            copy_file(self.source.folder / CONFIG, self.out / CONFIG)

    def _path(self, name: str) -> Path:
        """The finished shard (a run that was killed between the last layer and config.json), else the one being written."""
        return self.out / name if (self.out / name).is_file() else self.out / f"{name}.part"

    def _info(self, key: str) -> TensorInfo:
        assert key in self.source.stored, f"{key} is not stored as such in {self.source.name}"
        return self.source.stored[key]

    def _cast(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        info = self._info(key)
        if key in self.source.squeezed:  # only where the bitmask says that there is a weight
            tensor = tensor.detach().cpu()[self.source.kept(key)]
        assert tuple(tensor.shape) == info.shape, f"{key} has shape {list(info.shape)}, not {list(tensor.shape)}"
        cast = tensor.detach().to("cpu", DTYPES[info.dtype]).contiguous()
        if cast.is_floating_point() and not bool(cast.float().isfinite().all()):
            raise Diverged(f"Training diverged: {key} is not finite in {DTYPES[info.dtype]}; give a lower rate.")
        return cast
