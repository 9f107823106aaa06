"""Checkpoints that are damaged or lie: refused in one sentence, nothing written, the source as it was."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from damage import edit_header, says, shards
from refusals import BASE, Line, recipe_file, refused

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.progress import LOG


def overlap(header: dict[str, Any]) -> None:
    header["copy"] = dict(next(entry for key, entry in header.items() if key != "__metadata__"))


def lie_about_shape(header: dict[str, Any]) -> None:
    next(entry for key, entry in header.items() if key != "__metadata__")["shape"] = [1 << 40, 1 << 40]


def negative(header: dict[str, Any]) -> None:
    next(entry for key, entry in header.items() if key != "__metadata__")["data_offsets"] = [-8, -4]


def hole(header: dict[str, Any]) -> None:
    """The last tensor ends later than it did, and nothing else does."""
    entry = max((entry for key, entry in header.items() if key != "__metadata__"), key=lambda entry: entry["data_offsets"])
    entry["data_offsets"] = [entry["data_offsets"][0], entry["data_offsets"][0]]
    entry["shape"] = [0]


def integers(header: dict[str, Any]) -> None:
    next(entry for key, entry in header.items() if key != "__metadata__")["dtype"] = "I32"


def rename(header: dict[str, Any]) -> None:
    header["\x1b[2Jevil"] = header.pop(next(key for key in header if key != "__metadata__"))


def named_twice(source: Path) -> None:
    path = shards(source)[0]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length].rstrip()[:-1] + b',"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' * 2 + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def promised_twice(source: Path) -> None:
    path = source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors",'))


def wrong_shard(weight_map: dict[str, str]) -> None:
    files = sorted(set(weight_map.values()))
    weight_map["model.norm.weight"] = next(file for file in files if file != weight_map["model.norm.weight"])


def names_as(name: Any) -> Callable[[Path], None]:
    """An index that says so of its first tensor."""

    def change(source: Path) -> None:
        to_index(source, lambda weight_map: weight_map.__setitem__(next(iter(weight_map)), name))

    return change


def link_out(name: str) -> Callable[[Path], None]:
    """A file of the model that has become a link to one elsewhere."""

    def change(source: Path) -> None:
        path = source.parent / "elsewhere"
        (source / name).rename(path) if (source / name).exists() else path.write_text("secret")
        (source / name).symlink_to(path)

    return change


def poison(value: float, key: str = "model.layers.1.") -> Callable[[Path], None]:
    """One number of one tensor is something else."""

    def change(source: Path) -> None:
        checkpoint = Checkpoint.open(source)
        info = next(info for name, info in checkpoint.tensors.items() if name.startswith(key) and info.dtype == "F32")
        with open(source / info.file, "r+b") as file:
            file.seek(info.end - 4)
            file.write(struct.pack("<f", value))

    return change


def to_index(source: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def escape(weight_map: dict[str, str]) -> None:
    weight_map[next(iter(weight_map))] = "../x.safetensors"


def invent(weight_map: dict[str, str]) -> None:
    weight_map["model.invented.weight"] = next(iter(weight_map.values()))


def forget(weight_map: dict[str, str]) -> None:
    del weight_map["model.norm.weight"]


def pickle_only(source: Path) -> None:
    for path in [*shards(source), source / "model.safetensors.index.json"]:
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def more_experts(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["num_local_experts"] = 16
    (source / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda s: shards(s)[2].write_bytes(shards(s)[2].read_bytes()[:-64]), "is truncated"),
    "empty-shard": (lambda s: shards(s)[2].write_bytes(b""), "is not a safetensors file or is truncated"),
    "missing-shard": (lambda s: shards(s)[2].unlink(), "is missing from"),
    "escaping-index": (lambda s: to_index(s, escape), "The index names '../x.safetensors'"),
    "inventing-index": (lambda s: to_index(s, invent), "The index promises 'model.invented.weight'"),
    "overlap": (lambda s: edit_header(shards(s)[0], overlap), "has overlapping tensors"),
    "shape": (lambda s: edit_header(shards(s)[0], lie_about_shape), "has shape [1099511627776, 1099511627776]"),
    "negative": (lambda s: edit_header(shards(s)[0], negative), "is not one trimoe can read"),
    "long-header": (lambda s: shards(s)[0].write_bytes(struct.pack("<Q", 1 << 20) + b"{}"), "is not a safetensors file or is truncated"),
    "no-json": (lambda s: shards(s)[0].write_bytes(struct.pack("<Q", 8) + b"not json"), "has a header that is not valid JSON"),
    "list-header": (lambda s: shards(s)[0].write_bytes(struct.pack("<Q", 2) + b"[]"), "has a header that is not a JSON object"),
    "binary-header": (
        lambda s: shards(s)[0].write_bytes(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc"),
        "has a header that is not valid JSON",
    ),
    "hole": (lambda s: edit_header(shards(s)[0], hole), "bytes that belong to no tensor"),
    "tail": (lambda s: shards(s)[0].write_bytes(shards(s)[0].read_bytes() + b"more"), "bytes that belong to no tensor"),
    "integers": (lambda s: edit_header(shards(s)[0], integers), "weights are floating-point numbers"),
    "escape-sequence": (lambda s: edit_header(shards(s)[0], rename), "the header entry of '\\x1b[2Jevil'"),
    "named-twice": (named_twice, "has a header that names 'a' twice"),
    "promised-twice": (promised_twice, "names 'model.norm.weight' twice"),
    "wrong-shard": (lambda s: to_index(s, wrong_shard), "The index promises 'model.norm.weight'"),
    "absolute-index": (names_as("/etc/x.safetensors"), "only plain *.safetensors names"),
    "subfolder-index": (names_as("fp16/x.safetensors"), "only plain *.safetensors names"),
    "pickle-index": (names_as("pytorch_model.bin"), "only plain *.safetensors names"),
    "number-index": (names_as(7), "only plain *.safetensors names"),
    "list-index": (names_as(["x.safetensors"]), "only plain *.safetensors names"),
    "linked-shard": (lambda s: link_out(shards(s)[0].name)(s), "is a link to"),
    "linked-config": (link_out("config.json"), "is a link to"),
    "linked-licence": (link_out("LICENSE"), "is a link to"),
    "negative-layers": (says(num_hidden_layers=-1), "num_hidden_layers = -1; 1 to 1000 is allowed"),
    "many-layers": (says(num_hidden_layers=10**9), "num_hidden_layers = 1000000000; 1 to 1000 is allowed"),
    "layers-without-tensors": (says(num_hidden_layers=900), "no more than tensors"),
    "many-experts": (says(num_local_experts=10**9), "2 to 4096 is allowed"),
    "wide": (says(hidden_size=10**15), "cannot be built"),
    "words": (says(hidden_size="many"), "cannot read"),
    "typed": (says(model_type=["mixtral"]), "model_type = \"['mixtral']\"; a name is expected"),
    "kernel": (says(attn_implementation="someone/kernel"), "attention or experts kernel from the hub"),
    "deep-config": (lambda s: (s / "config.json").write_text('{"a":' * 100_000), "is not valid JSON"),
    "nested-config": (lambda s: (s / "config.json").write_text('{"a":' * 200 + "1" + "}" * 200), "nested more than 100 deep"),
    "long-number": (lambda s: (s / "config.json").write_text('{"a": ' + "9" * 10_000 + "}"), "is not valid JSON"),
    "half-pair": (lambda s: (s / "config.json").write_text('{"a": "\\ud800"}'), "is not valid JSON"),
    "pickle": (pickle_only, "holds pickled .bin weights"),
    "bad-config": (lambda s: (s / "config.json").write_text("{"), "is not valid JSON"),
    "list-config": (lambda s: (s / "config.json").write_text("[]"), "a JSON object is expected"),
    "unknown-type": (lambda s: (s / "config.json").write_text('{"model_type": "nothing"}'), "cannot read"),
    "other-config": (more_experts, "does not fit"),
    "no-vocabulary": (lambda s: (s / "tokenizer.json").write_text('{"model": 5}'), "has no tokenizer that transformers can load"),
    "no-tokenizer": (lambda s: [path.unlink() for path in s.glob("tokenizer*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(damage: str, line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    change(source)
    refused(line, message, source, text_file, tmp_path)


@pytest.mark.parametrize(
    ("value", "key"), [(math.nan, "model.layers.1."), (-math.inf, "model.layers.2."), (math.nan, "model.embed_tokens")]
)
def test_numbers_that_are_not_finite_are_named(value: float, key: str, line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    """Seen when the tensor is read: by then the journal lies in the output folder, and goes again, unless a stage was done."""
    poison(value, key)(source)
    out = tmp_path / "deep" / "out"
    line.refused(
        f"the tensor '{key}", "compress", source, "--recipe", recipe_file(tmp_path), "--out", out, "--calibration", text_file, *BASE
    )
    assert not out.exists() or ({path.name for path in out.iterdir()} == {".trimoe", LOG} and list(out.glob(".trimoe/stats-*")))
    assert out.exists() or not out.parent.exists()
    line.refused(
        "holds NaN or infinite numbers; every weight must be finite", "eval", source, "--text", text_file, "--length", 32, "--quiet"
    )


def test_a_cache_of_the_hub_is_links(source: Path, tmp_path: Path) -> None:
    hub = tmp_path / "models--org--name"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    commit = source.rename(hub / "snapshots" / "0123")
    for number, path in enumerate(sorted(commit.iterdir())):
        path.rename(hub / "blobs" / str(number))
        path.symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert Checkpoint.open(commit).files()
    (commit / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="is a link to"):
        Checkpoint.open(commit)


def test_what_the_index_forgets_is_read(source: Path) -> None:
    """transformers loads whole shards."""
    before = Checkpoint.open(source).tensors
    to_index(source, forget)
    assert Checkpoint.open(source).tensors == before


def test_two_models_in_a_folder_are_named(source: Path) -> None:
    """transformers loads model.safetensors, vLLM what the index names."""
    single = source / "model.safetensors"
    shutil.copy(shards(source)[0], single)
    with pytest.raises(UserError, match=r"two models: model\.safetensors.*model\.safetensors\.index\.json"):
        Checkpoint.open(source)
    for path in shards(source):
        if path != single:
            path.unlink()
    assert Checkpoint.open(source).files() == ["model.safetensors"], "an index without its shards means nothing"
