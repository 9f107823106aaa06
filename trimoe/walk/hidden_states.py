"""Tensors that grow with the calibration text: in memory up to a budget, in mapped temporary files beyond it (in TMPDIR, which must
not be memory itself; gone with the process).

The system writes mapped pages out when memory is short, so what lies there costs disk and time, not memory.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import psutil
import torch

from trimoe.checkpoint.atomic import disk_errors

BUDGET = 2 << 30  # bytes of hidden states in memory, of what one layer's experts are given, and of all layers' search tokens
FLOOR = 96 << 20  # bytes of hidden states that several versions of a model walked together may always take
LOGITS_BYTES = 5 * 4 << 24  # of five float32 tables of so many logits as are always held at once
SAMPLES = 24  # what versions are measured on, where STREAMS allows
STREAMS = 16 << 30  # bytes of hidden states of all versions together, in memory and in files
SHARE = 4  # versions' hidden states may take one part in so many of a GPU's memory


def wider(device: str | torch.device) -> int:
    """How many times as many logits as LOGITS are held at once on a device: a power of two, so that those take no more than a sixteenth of
    a GPU's memory, or a sixty-fourth of the host's. It goes by all memory, not by what is free, because where a sum is split shows in its last
    digits: the same machine splits it the same way each time, and so do all hosts below 40 GiB."""
    place = str(device).partition(":")[0]
    if place == "cuda" and torch.cuda.is_available():
        room = torch.cuda.get_device_properties(device).total_memory // 16
    elif place == "cpu":
        room = psutil.virtual_memory().total // 64
    else:
        room = 0
    return 1 << max(0, (room // LOGITS_BYTES).bit_length() - 1)


def samples_for(streams: int, sample: int, domains: int = 1) -> int:
    """How many samples, each of `sample` bytes of hidden states, so many versions are walked on: `streams` copies of them and two more take
    STREAMS bytes at most; SAMPLES at most, and one of each domain at least. It is the same on every machine, for decisions follow from it."""
    return max(domains, min(STREAMS // (sample * (streams + 2)), SAMPLES))


def streams_budget(layer: int, device: torch.device) -> int:
    """How many bytes of several versions' hidden states stay in memory; more lies in files. Half a decoder layer (of `layer` bytes) or FLOOR,
    whichever is more; on a GPU its share of the memory, if that is more still. Where they lie changes no result."""
    own = torch.cuda.get_device_properties(device).total_memory // SHARE if device.type == "cuda" and torch.cuda.is_available() else 0
    return max(FLOOR, layer // 2, own)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, taken: int = 0) -> torch.Tensor:
    """An empty tensor on `device` where, with `taken` bytes before it, it stays within the budget; else in a mapped file."""
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes or taken + nbytes <= BUDGET:
        return torch.empty(shape, dtype=dtype, device=device)
    with tempfile.NamedTemporaryFile(prefix="trimoe-") as file:  # the mapping outlives the name
        with disk_errors(Path(file.name)):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is found now, not by the first page that cannot be written
            else:
                file.truncate(nbytes)
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


class HiddenStates(MutableSequence[torch.Tensor]):
    """Hidden states, one tensor a batch. Those beyond the budget (BUDGET bytes, or those given) are copied out on every access, so that what
    was taken stays as it was."""

    def __init__(self, budget: int | None = None) -> None:
        self._budget = BUDGET if budget is None else budget
        self._held: list[torch.Tensor] = []
        self._place: list[torch.device | None] = []  # of those in files: the device that they belong on
        self._beside: list[Any] = []  # what hangs on them (LayerWalk.step)
        self._taken = 0

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: Any) -> Any:
        place, held = self._place[index], self._held[index]
        if place is None:
            return held
        copied = held.to(place, copy=True)
        copied.beside = self._beside[index]
        return copied

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._place[index] is None:
            self._held[index] = value
        else:
            self._held[index].copy_(value)
        self._beside[index] = getattr(value, "beside", ())

    def insert(self, index: int, value: torch.Tensor) -> None:
        assert index == len(self._held), "batches come in order"
        nbytes = value.numel() * value.element_size()
        spilled = self._taken + nbytes > self._budget
        self._held.append(room(tuple(value.shape), value.dtype, value.device, BUDGET).copy_(value) if spilled else value)
        self._place.append(value.device if spilled else None)
        self._beside.append(getattr(value, "beside", ()))
        self._taken += 0 if spilled else nbytes

    def put_down(self) -> None:
        """What is still in memory goes to files, too: it will not be needed for a while."""
        for index, held in enumerate(self._held):
            if self._place[index] is None:
                self._held[index] = room(tuple(held.shape), held.dtype, held.device, BUDGET).copy_(held)
                self._place[index] = held.device
        self._taken = self._budget

    def __delitem__(self, index: Any) -> None:
        raise TypeError("batches are not taken away")
