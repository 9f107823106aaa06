"""Which files of a folder hold the model's tensors, as transformers chooses them, and their headers together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from trimoe.checkpoint.headers import TensorInfo, read_header, read_json
from trimoe.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "transformers_weights"  # a field of config.json by which transformers loads another file


def weight_map_of(folder: Path) -> dict[str, str] | None:
    """Which shard holds which tensor, by the index; None without one."""
    if not (folder / INDEX).is_file():
        return None
    weight_map = read_json(folder / INDEX, repeats=False).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map.")
    known: set[str] = set()
    for file in weight_map.values():
        if isinstance(file, str) and file in known:
            continue
        plain = isinstance(file, str) and file.isprintable() and len(file) < 256 and not {"/", "\\"} & set(file)
        if not plain or not file.endswith(".safetensors"):
            raise UserError(f"The index names {str(file)[:80]!r}; only plain *.safetensors names inside the folder are allowed.")
        known.add(file)
    return weight_map


def weight_files(folder: Path, present: Collection[str] | None = None) -> list[str]:
    """The safetensors files that make the model, which transformers would load. `present`: the names of files that are there, where these
    are not all in `folder` (on the hub). Raises UserError where there are none, and where engines would load different ones."""
    return _chosen(folder, present)[0]


def _chosen(folder: Path, present: Collection[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """What `weight_files` says, and which of the files the index, if there is one, has each tensor in."""
    there = {path.name for path in folder.iterdir() if path.is_file()} if present is None else set(present)
    named = read_json(folder / "config.json").get(NAMED)
    if named is not None:
        raise UserError(f"{folder / 'config.json'} has {NAMED} = {str(named)[:80]!r}; only {SINGLE} or {INDEX} is read: remove that field.")
    weight_map = weight_map_of(folder) or {}
    shards = sorted(set(weight_map.values()))
    if SINGLE in there:
        others = [file for file in shards if file in there and file != SINGLE]
        if others:
            raise UserError(
                f"{folder} holds two models: {SINGLE}, which transformers loads, and the {len(others)} files that {INDEX} names ({others[0]} "
                "...), which other engines load. Delete the one that is not meant."
            )
        return [SINGLE], weight_map
    if shards:
        return shards, weight_map
    _refuse_none(folder, there)
    raise AssertionError


def _refuse_none(folder: Path, there: Collection[str]) -> None:
    others = sorted(name for name in there if name.endswith(".safetensors"))
    if others:
        numbered = any("-of-" in name for name in others)
        hint = "the index that names these shards is missing" if numbered else f"{SINGLE} is what transformers loads"
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}, but {', '.join(others[:3])}: {hint}.")
    if any(name.endswith(".bin") for name in there):
        raise UserError(f"{folder} holds pickled .bin weights, which can run code when read; convert it to safetensors first.")
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}.")


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the model in a folder."""
    files, weight_map = _chosen(folder)
    if files == [SINGLE]:
        return read_header(folder / SINGLE)
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise UserError(f"Shard {file} named in the index is missing from {folder}.")
        headers[file] = read_header(folder / file)
    return together(headers, weight_map)


def together(headers: Mapping[str, Mapping[str, TensorInfo]], weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of all shards: also those that the index forgets, for transformers loads whole shards. Raises UserError where the index
    promises what is not there, or where a tensor lies in two shards and the index means another one than transformers takes, the last."""
    lost = [key for key, file in weight_map.items() if key not in headers[file]]
    if lost:
        raise UserError(f"The index promises {lost[0]!r} in {weight_map[lost[0]]}, which does not hold it ({len(lost)} such).")
    found = {key: headers[file][key] for key, file in weight_map.items()}
    for file in sorted(headers):
        for key, info in headers[file].items():
            if found.setdefault(key, info).file < file:
                raise UserError(
                    f"The tensor {key!r} lies in {found[key].file} and in {file}; the index means the first, transformers takes the second."
                )
    return found
