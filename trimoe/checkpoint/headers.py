"""The headers of safetensors files, read and written, and the JSON beside them. Nothing that is read here is trusted."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimoe.errors import UserError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_JSON = 100_000_000  # bytes of config.json or an index; the largest known index has a quarter of that
OFFSETS = 1 << 63  # sizes and places in a file are below
MAX_AXES, MAX_DEPTH = 16, 100  # axes of a tensor; brackets within brackets in JSON


class TensorInfo(NamedTuple):
    """Where one tensor lies: `start` and `end` are byte offsets from the beginning of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Repeated(ValueError):
    """A name that stands twice in one JSON object."""


def read_json(path: Path, *, repeats: bool = True) -> dict[str, Any]:
    """A JSON object from a file; `repeats`: whether a name may stand in it twice (the last one counts, as for everyone else)."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: it is not a model folder.")
    if path.stat().st_size > MAX_JSON:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON:,} are read.")
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=None if repeats else _once)
        if "\\u" in text:  # half a surrogate pair is no text, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode()
    except Repeated as error:
        raise UserError(f"{path} names {str(error)[:120]} twice.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; a JSON object is expected.")
    if _deep(value):
        raise UserError(f"{path} is nested more than {MAX_DEPTH} deep.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise Repeated(repr(next(name for name, _ in pairs if name in seen or seen.add(name))))  # type: ignore[func-returns-value]
    return found


def _deep(value: Any, left: int = MAX_DEPTH) -> bool:
    if isinstance(value, (dict, list)):
        return not left or any(_deep(item, left - 1) for item in (value.values() if isinstance(value, dict) else value))
    return False


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against the file's size.

    https://huggingface.co/docs/safetensors: 8 bytes little-endian length, JSON, tensor bytes without overlaps or holes.
    """
    size = path.stat().st_size
    header, base = _header(path, size)
    tensors = {key: info_of(path, key, entry, base) for key, entry in header.items() if key != "__metadata__"}
    for key, info in tensors.items():
        if info.end > size:
            raise UserError(f"{path} is truncated: {key!r} should end at byte {info.end}, the file has {size}.")
    spans = sorted((info.start, info.end) for info in tensors.values())
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise UserError(f"{path} has overlapping tensors.")
    edges = [base, *itertools.chain.from_iterable(spans), size]
    if any(edges[place] != edges[place + 1] for place in range(0, len(edges), 2)):
        raise UserError(f"{path} has bytes that belong to no tensor; its tensors must fill it without holes.")
    return tensors


def _header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON, and the byte at which the tensors begin."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file or is truncated (header of {length} bytes in a file of {size}).")
        try:
            header = json.loads(file.read(length).decode(), object_pairs_hook=_once)
        except Repeated as error:
            raise UserError(f"{path} has a header that names {str(error)[:120]} twice.") from None
        except (ValueError, RecursionError):
            raise UserError(f"{path} has a header that is not valid JSON.") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} has a header that is not a JSON object.")
    return header, 8 + length


def info_of(path: Path, key: str, entry: Any, base: int) -> TensorInfo:
    """One entry of a header, or UserError; `path` is the file, `base` the byte at which its tensors begin."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        wrong = len(shape) > MAX_AXES or not isinstance(dtype, str) or dtype not in DTYPES
        for n in (*shape, start, end):  # a loop, for large models have 90,000 entries
            wrong = wrong or type(n) is not int or not 0 <= n < OFFSETS
    except (TypeError, KeyError, ValueError):
        wrong = True
    # a name of other characters could speak to the terminal; an empty tensor may still have strides that overflow
    if wrong or not key.isprintable() or (0 in shape and math.prod(max(n, 1) for n in shape) > 1 << 56):
        raise UserError(f"{path}: the header entry of {key[:200]!r} is not one trimoe can read: {str(entry)[:120]!a}.")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise UserError(f"{path}: {key!r} has shape {list(shape)} of {dtype} but {end - start} bytes.")
    return TensorInfo(path.name, dtype, shape, base + start, base + end)


def header_bytes(entries: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The exact header of a safetensors file holding `entries` (key, dtype, shape) in that order, length word included."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dtype, shape in entries:
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
