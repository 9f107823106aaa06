"""A model on disk: its configuration, what its safetensors headers say, and reads of single tensors. Trusts nothing it reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimoe.errors import UserError
from trimoe.modeling_trimoe import BITMASK, bits_of, expand
from trimoe.packing import BITS, PARTS, Packed, packed_columns, unpack

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
BUILTIN = Path(__file__).parent / "builtin" / "models"
# Everything beside the weights that makes a checkpoint usable: read by us, or carried over unchanged.
# (On the hub, names with a folder in them are other formats of the same model.)
SAMPLE, SAMPLES = 1 << 14, 16  # bytes of a piece of a shard, and how many of them, for the fingerprint
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` and `end` are byte offsets from the beginning of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Checkpoint:
    """A folder of safetensors, or the headers of one on the hub.

    Matrices in packed integers (compressed-tensors `pack-quantized`), and tensors whose zeros are left out (`bitmask`), appear in `tensors`
    as the dense ones they stand for, under the names those would have, and are read as such; `packed(key)` gives the integers. `stored` is
    what really lies in the files.
    """

    def __init__(self, name: str, folder: Path, tensors: dict[str, TensorInfo]):
        self.name, self.folder, self.stored = name, folder, tensors
        self.scheme = _packed_scheme(name, self.config)
        self.tensors = tensors if self.scheme is None else _dense_view(name, tensors, *self.scheme)
        masks = [key for key in tensors if key.endswith(BITMASK)]
        self.squeezed = {key.removesuffix(BITMASK) for key in masks}
        if masks:
            self.tensors = _expanded_view(name, self.tensors, masks)

    @classmethod
    def open(cls, model: str | os.PathLike[str], *, weights: bool = True) -> Checkpoint:
        """`model` is a folder, `builtin:NAME` or a hub id; with `weights=False` a hub model's shards stay on the hub."""
        name = str(model)
        if name.startswith("builtin:"):
            folder = BUILTIN / name.removeprefix("builtin:")
            if not folder.is_dir():
                known = ", ".join(sorted(f"builtin:{p.name}" for p in BUILTIN.iterdir() if p.is_dir()))
                raise UserError(f"There is no built-in model {name!r}; there are: {known}.")
            return cls(name, folder, _read_headers(folder))
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls(name, folder, _read_headers(folder))
        if folder.is_file():
            raise UserError(f"{name} is a file; give the folder that holds config.json and the safetensors.")
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(f"There is no folder {name!r} (a model is a folder, a hub id such as org/name, or builtin:NAME).")
        return _open_hub(name, weights=weights)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as written."""
        return read_json(self.folder / "config.json")

    def read(self, key: str) -> torch.Tensor:
        """One tensor in its own dtype, in fresh memory (no mapped pages stay behind)."""
        return self.read_together([key])[key]

    def read_together(self, keys: Sequence[str]) -> dict[str, torch.Tensor]:
        """Several tensors in one piece of memory, which is given back to the system as soon as the last of them is gone."""
        aligned = [-(-self.tensors[key].nbytes // 64) * 64 for key in keys]
        buffer = torch.empty(sum(aligned), dtype=torch.uint8)
        out, start = {}, 0
        for key, size in zip(keys, aligned, strict=True):
            info = self.tensors[key]
            piece = buffer[start : start + info.nbytes]
            if key in self.squeezed:
                parts = [self._stored(part) for part in (key, key + BITMASK)]
                try:
                    piece.view(DTYPES[info.dtype]).view(info.shape).copy_(expand(*parts))
                except ValueError as error:
                    raise UserError(f"{self.name}, {key}: {error}") from None
            elif key in self.stored:
                self._fill(piece, key, info)
            else:
                piece.view(DTYPES[info.dtype]).view(info.shape).copy_(self.packed(key).dense())
            out[key] = piece.view(DTYPES[info.dtype]).view(info.shape)
            start += size
        return out

    def packed(self, key: str) -> Packed:
        """The integers and scales that the matrix `key` is stored as."""
        assert self.scheme is not None
        bits, _ = self.scheme
        words, scale_OG = (self._stored(f"{key.removesuffix('weight')}{part}") for part in PARTS[:2])
        columns = self.tensors[key].shape[1]
        return Packed(unpack(words, bits, columns), scale_OG, bits, columns // scale_OG.shape[1])

    def kept(self, key: str) -> torch.Tensor:
        """Which weights of a tensor whose zeros are left out are not: bool, of its dense shape."""
        return bits_of(self._stored(key + BITMASK))

    def _stored(self, key: str) -> torch.Tensor:
        info = self.stored[key]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(raw, key, info)
        return raw.view(DTYPES[info.dtype]).view(info.shape)

    def _fill(self, piece: torch.Tensor, key: str, info: TensorInfo) -> None:
        view, done = piece.numpy().data, 0
        with open(self.folder / info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(f"{info.file} ends inside tensor {key!r}: the file is truncated.")
                done += count

    def files(self) -> list[str]:
        return sorted({info.file for info in self.stored.values()})

    def side_files(self) -> list[Path]:
        """Tokenizer, generation config, licence and the like; not config.json, not the index, no code."""
        found = {path for pattern in SIDE_FILES for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in ("config.json", "trimoe.json") and not path.name.endswith(".index.json"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.stored.values())

    @cached_property
    def fingerprint(self) -> str:
        """Of the configuration, every header entry and pieces of every shard's bytes, spread over it: training changes bytes everywhere."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key in sorted(self.stored):
            digest.update(f"{key}{self.stored[key]}".encode())
        for file in self.files():
            size = os.path.getsize(self.folder / file)
            with open(self.folder / file, "rb") as stream:
                for place in range(SAMPLES + 1):
                    stream.seek(max(0, size - SAMPLE) * place // SAMPLES)
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()[:32]


def _packed_scheme(name: str, config: dict[str, Any]) -> tuple[int, int] | None:
    """(bits, group) of a `pack-quantized` checkpoint, None of one that is not quantised. Other ways of quantising are refused."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise UserError(f"{name}: quantization_config in config.json is {str(quantization)[:60]!r}; a mapping is expected.")
    method, form, groups = quantization.get("quant_method"), quantization.get("format"), quantization.get("config_groups")
    found = [group.get("weights") if isinstance(group, dict) else None for group in groups.values()] if isinstance(groups, dict) else []
    weights = [weight if isinstance(weight, dict) else {} for weight in found]
    same = len({(str(w.get("num_bits")), str(w.get("group_size"))) for w in weights}) == 1
    if method != "compressed-tensors" or form != "pack-quantized" or not same or not weights[0].get("symmetric"):
        raise UserError(
            f"{name} is already quantised ({method}{f', {form}' if form else ''}); of quantised checkpoints only compressed-tensors' symmetric "
            "pack-quantized ones can be read. Give the bf16, fp16 or fp32 checkpoint it was made from."
        )
    bits, group = weights[0].get("num_bits"), weights[0].get("group_size")
    if bits not in BITS or type(group) is not int or group < 1:
        raise UserError(
            f"{name} is quantised to {bits!r} bits in groups of {group!r}; {' and '.join(map(str, BITS))} bits in groups can be read."
        )
    return bits, group


def _dense_view(name: str, stored: dict[str, TensorInfo], bits: int, group: int) -> dict[str, TensorInfo]:
    """`stored` with each packed matrix under its dense name, shape and the scales' dtype."""
    out: dict[str, TensorInfo] = {}
    for key, info in stored.items():
        base, _, part = key.rpartition(".")
        if part in PARTS[1:] and f"{base}.{PARTS[0]}" in stored:
            continue
        if part != PARTS[0]:
            out[key] = info
            continue
        scale = stored.get(f"{base}.{PARTS[1]}")
        if scale is None or len(info.shape) != 2 or len(scale.shape) != 2 or scale.shape[0] != info.shape[0] or info.dtype != "I32":
            raise UserError(f"{name}: {key} has no fitting {PARTS[1]} beside it.")
        columns = scale.shape[1] * group
        if packed_columns(columns, bits) != info.shape[1]:
            raise UserError(f"{name}: {key} of shape {list(info.shape)} does not hold {scale.shape[1]} groups of {group} in {bits} bits.")
        shape = (info.shape[0], columns)
        out[f"{base}.weight"] = TensorInfo(info.file, scale.dtype, shape, 0, math.prod(shape) * DTYPES[scale.dtype].itemsize)
    return out


def _expanded_view(name: str, stored: dict[str, TensorInfo], masks: list[str]) -> dict[str, TensorInfo]:
    """`stored` with each tensor that has a bitmask in its dense shape."""
    out = {key: info for key, info in stored.items() if key not in masks}
    for key in masks:
        mask, values = stored[key], out.get(key.removesuffix(BITMASK))
        if values is None or len(values.shape) != 1 or mask.dtype != "U8" or len(mask.shape) < 2:
            raise UserError(f"{name}: {key} has no fitting values beside it.")
        shape = (*mask.shape[:-1], 8 * mask.shape[-1])
        out[key.removesuffix(BITMASK)] = replace(values, shape=shape, start=0, end=math.prod(shape) * DTYPES[values.dtype].itemsize)
    return out


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: it is not a model folder.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; a JSON object is expected.")
    return value


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    read_json(folder / "config.json")
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map.")
        files = sorted({str(file) for file in weight_map.values()})
    elif (folder / SINGLE).is_file():
        weight_map, files = None, [SINGLE]
    else:
        if any(folder.glob("*.bin")):
            raise UserError(f"{folder} holds pickled .bin weights, which can run code when read; convert it to safetensors first.")
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(f"The index names {file!r}; only plain *.safetensors names inside the folder are allowed.")
        if not (folder / file).is_file():
            raise UserError(f"Shard {file} named in the index is missing from {folder}.")
        tensors.update(read_header(folder / file))
    if weight_map is not None:
        lost = [key for key in weight_map if key not in tensors]
        if lost:
            raise UserError(f"The index promises {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it ({len(lost)} such).")
        tensors = {key: tensors[key] for key in weight_map}
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against the file's size.

    https://huggingface.co/docs/safetensors: 8 bytes little-endian length, JSON, tensor bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(f"{path} is not a safetensors file or is truncated (header of {length} bytes in a file of {size}).")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise UserError(f"{path} has a header that is not valid JSON.") from None
    if not isinstance(header, dict):
        raise UserError(f"{path} has a header that is not a JSON object.")
    tensors, base = {}, 8 + length
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            wrong = not all(type(n) is int and n >= 0 for n in (*shape, start, end))
        except (TypeError, KeyError, ValueError):
            wrong = True
        if wrong or not isinstance(dtype, str) or dtype not in DTYPES:
            raise UserError(f"{path}: the header entry of {key!r} is not one trimoe can read: {str(entry)[:120]}.")
        if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{path}: {key!r} has shape {list(shape)} of {dtype} but {end - start} bytes.")
        if base + end > size:
            raise UserError(f"{path} is truncated: {key!r} should end at byte {base + end}, the file has {size}.")
        tensors[key] = TensorInfo(path.name, dtype, shape, base + start, base + end)
    spans = sorted((info.start, info.end) for info in tensors.values())
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise UserError(f"{path} has overlapping tensors.")
    return tensors


def _open_hub(name: str, *, weights: bool) -> Checkpoint:
    """A hub id: side files always, shards only if wanted (headers come by range requests otherwise)."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        folder = Path(hub.snapshot_download(name, allow_patterns=[*SIDE_FILES], ignore_patterns=["*/*"]))
        if weights:
            shards = sorted(set(read_json(folder / INDEX)["weight_map"].values())) if (folder / INDEX).is_file() else [SINGLE]
            folder = Path(hub.snapshot_download(name, allow_patterns=[*SIDE_FILES, *shards], ignore_patterns=["*/*"]))
            return Checkpoint(name, folder, _read_headers(folder))
        metadata = hub.get_safetensors_metadata(name)
    except HFValidationError:
        raise UserError(f"{name!r} is neither a folder nor a valid hub id.") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(f"{name!r} is not a folder here and could not be had from the hub ({reason}).") from None
    tensors = {
        key: TensorInfo(file, str(info.dtype), tuple(info.shape), *info.data_offsets)
        for file, parsed in metadata.files_metadata.items()
        for key, info in parsed.tensors.items()
    }
    return Checkpoint(name, folder, tensors)


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
