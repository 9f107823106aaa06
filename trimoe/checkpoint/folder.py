"""A model on disk: its configuration, what its safetensors headers say, and reads of single tensors. Trusts nothing it reads."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint.headers import DTYPES, TensorInfo, info_of, read_json
from trimoe.checkpoint.packed import BITS, PARTS, Packed, packed_columns, unpack
from trimoe.checkpoint.shards import INDEX, read_headers, weight_files
from trimoe.checkpoint.side_files import CARD, carried, left_out, names_in
from trimoe.errors import UserError, first_line
from trimoe.modeling_trimoe import BITMASK, bits_of, expand

BUILTIN = Path(__file__).parents[1] / "builtin" / "models"
ADAPTER = "adapter_config.json"  # what peft calls its own
SMALL = 1 << 20  # bytes of a tensor that the fingerprint takes whole
SAMPLE, SAMPLES = 1 << 14, 16  # bytes of a piece of a shard, and how many of them, for the fingerprint
PIECE = 4 << 20  # bytes of a tensor that are read before they are looked at and converted


class Checkpoint:
    """A folder of safetensors, or the headers of one on the hub.

    Matrices in packed integers (compressed-tensors `pack-quantized`), and tensors whose zeros are left out (`bitmask`), appear in `tensors`
    as the dense ones they stand for, under the names those would have, and are read as such; `packed(key)` gives the integers. `stored` is
    what really lies in the files.
    """

    def __init__(self, name: str, folder: Path, tensors: dict[str, TensorInfo]):
        self.name, self.folder, self.stored = name, folder, tensors
        self.scheme = _packed_scheme(name, self.config)
        _refuse_float8(name, tensors)
        self.tensors = tensors if self.scheme is None else _dense_view(name, tensors, *self.scheme)
        masks = [key for key in tensors if key.endswith(BITMASK)]
        self.squeezed = {key.removesuffix(BITMASK) for key in masks}
        if masks:
            self.tensors = _expanded_view(name, self.tensors, masks)

    @classmethod
    def open(cls, model: str | os.PathLike[str], *, weights: bool = True) -> Checkpoint:
        """`model` is a folder, `builtin:NAME` or a hub id; with `weights=False` a hub model's shards stay on the hub."""
        name = str(model)
        try:
            name.encode()  # it is recorded
        except UnicodeEncodeError:
            raise UserError(f"The model's name {name!a} is no UTF-8 text; rename the folder.") from None
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
        config = read_json(self.folder / "config.json")
        kind = config.get("model_type")
        if kind is not None and not (isinstance(kind, str) and kind.isprintable()):
            raise UserError(f"{self.name}: config.json says model_type = {str(kind)[:60]!a}; a name is expected.")
        return config

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
            out[key] = self._finite(key, piece.view(DTYPES[info.dtype]).view(info.shape))
            start += size
        return out

    def read_into(self, key: str, out: torch.Tensor) -> None:
        """One tensor into `out` (its shape, any floating-point dtype and device), piece by piece: what is converted is still in the cache."""
        info, dtype = self.tensors[key], DTYPES[self.tensors[key].dtype]
        if key in self.squeezed or key not in self.stored:
            out.copy_(self.read(key))
            return
        straight = out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu"
        row = info.nbytes // max(1, info.shape[0])
        rows = max(1, PIECE // max(1, row))
        scratch = torch.empty(0 if straight else min(rows * row, info.nbytes), dtype=torch.uint8)
        with open(self.folder / info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            for place in out.split(rows):
                piece = place.view(-1).view(torch.uint8) if straight else scratch[: place.numel() * dtype.itemsize]
                _fill(file, piece, key, info)
                found = self._finite(key, piece.view(dtype).view(place.shape))
                if not straight:
                    place.copy_(found)

    def packed(self, key: str) -> Packed:
        """The integers and scales that the matrix `key` is stored as."""
        assert self.scheme is not None
        bits, _ = self.scheme
        words, scale_OG = (self._stored(f"{key.removesuffix('weight')}{part}") for part in PARTS[:2])
        columns = self.tensors[key].shape[1]
        return Packed(unpack(words, bits, columns), self._finite(key, scale_OG), bits, columns // scale_OG.shape[1])

    def kept(self, key: str) -> torch.Tensor:
        """Which weights of a tensor whose zeros are left out are not: bool, of its dense shape."""
        return bits_of(self._stored(key + BITMASK))

    def _finite(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, or UserError if it holds NaN or infinities, which would spread over everything computed from it."""
        if tensor.numel() and tensor.is_floating_point():
            # smallest and largest, not isfinite().all(): ten times as fast and without a copy; 8-bit floats only have the latter
            ends = torch.stack(tensor.aminmax()) if tensor.element_size() > 1 else tensor.half()
            if not bool(ends.isfinite().all()):
                raise UserError(f"{self.name}: the tensor {key!r} holds NaN or infinite numbers; every weight must be finite.")
        return tensor

    def _stored(self, key: str) -> torch.Tensor:
        info = self.stored[key]
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(raw, key, info)
        return raw.view(DTYPES[info.dtype]).view(info.shape)

    def _fill(self, piece: torch.Tensor, key: str, info: TensorInfo) -> None:
        with open(self.folder / info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            _fill(file, piece, key, info)

    def stored_bytes(self, key: str) -> int:
        """Bytes in the files of all that one tensor is stored as: integers and scales, or values and bitmask, or itself."""
        if self.tensors is self.stored:
            return self.stored[key].nbytes
        base = key.removesuffix("weight")
        parts = [key] if key in self.stored else [base + part for part in PARTS]
        return sum(self.stored[part].nbytes for part in (*parts, key + BITMASK) if part in self.stored)

    def files(self) -> list[str]:
        return sorted({info.file for info in self.stored.values()})

    def side_files(self) -> list[str]:
        """What is carried over unchanged: paths in the folder of everything but weights and what is written anew."""
        return carried(self._names)

    def other_weights(self) -> list[str]:
        """Weights that lie beside the model's own and are not carried over."""
        return left_out(self._names, self.files())

    @cached_property
    def _names(self) -> list[str]:
        return names_in(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(info.nbytes for info in self.stored.values())

    @cached_property
    def fingerprint(self) -> str:
        """Of the configuration, every header entry, every small tensor (training may change routers alone) and pieces of every shard's bytes."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for key in sorted(self.stored):
            digest.update(f"{key}{self.stored[key]}".encode())
            if self.stored[key].nbytes <= SMALL:
                digest.update(self._stored(key).view(-1).view(torch.uint8).numpy().data)
        for file in self.files():
            size = os.path.getsize(self.folder / file)
            with open(self.folder / file, "rb") as stream:
                for place in range(SAMPLES + 1):
                    stream.seek(max(0, size - SAMPLE) * place // SAMPLES)
                    digest.update(stream.read(SAMPLE))
        return digest.hexdigest()[:32]


def _fill(file: io.FileIO, piece: torch.Tensor, key: str, info: TensorInfo) -> None:
    """All of `piece` (bytes) from where the file stands."""
    view, done = piece.numpy().data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise UserError(f"{info.file} ends inside tensor {key!r}: the file is truncated.")
        done += count


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


def _refuse_float8(name: str, stored: dict[str, TensorInfo]) -> None:
    """8-bit floats are stored beside scales, which only a quantization_config tells of; without them they are other numbers."""
    narrow = [key for key, info in stored.items() if info.dtype.startswith("F8_")]
    if narrow:
        raise UserError(
            f"{name}: {narrow[0]!r} is stored in 8-bit floats ({stored[narrow[0]].dtype}, {len(narrow)} such), and config.json has no "
            "quantization_config that says how they are scaled. Give the bf16, fp16 or fp32 checkpoint."
        )


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
        if not DTYPES[scale.dtype].is_floating_point:
            raise UserError(f"{name}: {base}.{PARTS[1]} is stored as {scale.dtype}; scales are floating-point numbers.")
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
        out[key.removesuffix(BITMASK)] = values._replace(shape=shape, start=0, end=math.prod(shape) * DTYPES[values.dtype].itemsize)
    return out


def _read_headers(folder: Path) -> dict[str, TensorInfo]:
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter, no model: load it onto its base with peft, or make the model by trimoe recover without --adapter."
        )
    read_json(folder / "config.json")
    _refuse_links(folder)
    return read_headers(folder)


def _refuse_links(folder: Path) -> None:
    """Files that are links out of the folder could carry anything on this machine into the result. The hub's cache has such links, from
    snapshots/COMMIT to blobs beside it."""
    root = folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    nested = [folder / name for name in carried(names_in(folder)) if "/" in name]
    for path in (*sorted(folder.iterdir()), *nested):
        target = path.resolve() if path.is_symlink() else root
        if not target.is_relative_to(root) and target.parent != blobs:
            raise UserError(f"{path} is a link to {target}, outside the folder; put the file itself there.")


def _open_hub(name: str, *, weights: bool) -> Checkpoint:
    """A hub id: what lies beside the weights always, shards only if wanted (headers come by range requests otherwise)."""
    import huggingface_hub as hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    try:
        present = _on_hub(name)
        wanted = [glob.escape(file) for file in ("config.json", INDEX, CARD, *carried(present)) if file in present]
        folder = Path(hub.snapshot_download(name, allow_patterns=wanted))
        files = weight_files(folder, present)
        if weights:
            wanted += [glob.escape(file) for file in files]
            folder = Path(hub.snapshot_download(name, allow_patterns=wanted))
            return Checkpoint(name, folder, _read_headers(folder))
        metadata = hub.get_safetensors_metadata(name)
    except HFValidationError:
        raise UserError(f"{name!r} is neither a folder nor a valid hub id.") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        raise UserError(f"{name!r} is not a folder here and could not be had from the hub ({first_line(error)}).") from None
    tensors = {
        key: info_of(Path(file), key, {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}, 0)
        for file, parsed in metadata.files_metadata.items()
        for key, info in parsed.tensors.items()
    }
    return Checkpoint(name, folder, tensors)


def _on_hub(name: str) -> list[str]:
    """The files of a repository; without a connection, those of it that are here."""
    import huggingface_hub as hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return hub.HfApi().list_repo_files(name)
    except OfflineModeIsEnabled:
        return names_in(Path(hub.snapshot_download(name, local_files_only=True)))
