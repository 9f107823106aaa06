"""Folders that lie or mean harm: what was found by fuzzing (benchmarks/fuzz.py), code beside a model, tensors too many, tokenizers of others."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import edit_header, says, shards
from refusals import UNIFORM, snapshot
from safetensors.torch import load_file, save_file

import trimoe
from trimoe.errors import UserError, first_line
from trimoe.model import transformers5

Family = Callable[[str], Path]
INDEX = "model.safetensors.index.json"


def refusal(model: Path) -> str:
    """What plan says of a model; inspect says the same, or describes it as not supported for that reason."""
    with pytest.raises(UserError) as found:
        trimoe.plan(str(model), UNIFORM)
    said = str(found.value)
    assert "\n" not in said
    assert inspected(model) == said
    return said


def inspected(model: Path) -> str:
    try:
        return trimoe.inspect(str(model)).get("reason", "supported")
    except UserError as error:
        return str(error)


# ---- found by fuzzing


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {"head_dim": 10**9}), ("deepseek_v3", {"head_dim": 10**9}), ("gpt_oss", {"head_dim": 1 << 31}),
        # 8 * "8" is "88888888" in Python
        ("qwen3_next", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": "8"}}),
    ],
)  # fmt: skip
def test_tables_of_gigabytes_are_not_made(family: str, fields: dict[str, Any], family_folder: Family, tmp_path: Path) -> None:
    """Rope tables are real numbers even in a model without weights: 10^9 channels took 20 seconds and 4 GB before anything was refused."""
    folder = Path(shutil.copytree(family_folder(family), tmp_path / "source"))
    says(**fields)(folder)
    start = time.monotonic()
    assert "bytes beside its weights; it is damaged" in refusal(folder)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("groups", [1 << 64, 0])
def test_one_line_of_others_exceptions(groups: int, family_folder: Family, tmp_path: Path) -> None:
    """torch says in two lines that a size cannot be unpacked; a router divides by its groups."""
    folder = Path(shutil.copytree(family_folder("deepseek_v3"), tmp_path / "source"))
    says(n_group=groups)(folder)
    assert "its router cannot be run by itself" in refusal(folder)
    assert first_line(ValueError("\n one \n two")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("field 'x':\n    not a number")) == "field 'x': not a number"
    assert len(first_line(ValueError("x" * 5000))) == 160


def test_ctrl_c_is_not_a_mistake_in_the_configuration(family_folder: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of building, transformers' own tidying up fails with something else."""

    def stopped(*_: Any, **__: Any) -> None:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise UnboundLocalError("original_init_weights")
        except UnboundLocalError as error:
            raise ValueError("a validator's own words") from error

    for where, name in ((transformers5, "build_bare"), (transformers5.AutoConfig, "from_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, stopped)
            with pytest.raises(KeyboardInterrupt):
                trimoe.inspect(str(family_folder("mixtral")))


# ---- headers


def first_entry(header: dict[str, Any]) -> dict[str, Any]:
    return next(entry for key, entry in header.items() if key != "__metadata__")


def beyond(header: dict[str, Any]) -> None:
    """The last tensor lies behind the end of the file."""
    entry = max((entry for key, entry in header.items() if key != "__metadata__"), key=lambda entry: entry["data_offsets"])
    entry["data_offsets"] = [offset + (1 << 40) for offset in entry["data_offsets"]]


def unknown_dtype(header: dict[str, Any]) -> None:
    first_entry(header)["dtype"] = "F4"


def other_width(header: dict[str, Any]) -> None:
    first_entry(header)["dtype"] = "F64"


def turned(header: dict[str, Any]) -> None:
    entry = next(entry for key, entry in header.items() if key.endswith("w1.weight"))
    entry["shape"] = entry["shape"][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (beyond, "is truncated"), (unknown_dtype, "is not one trimoe can read"), (other_width, "but"), (turned, "fit"),
    ],
)  # fmt: skip
def test_headers_that_lie(change: Callable[[dict[str, Any]], None], message: str, source: Path) -> None:
    path = next(path for path in shards(source) if b"w1.weight" in path.read_bytes())
    edit_header(path, change)
    assert message in refusal(source)


def test_tensors_that_the_architecture_does_not_use(source: Path) -> None:
    """Not carried along in silence: a folder of another model's tensors is damaged."""
    path = shards(source)[0]
    save_file({**load_file(path), "model.layers.0.extra.weight": torch.zeros(2, 2)}, path, metadata={"format": "pt"})
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.layers.0.extra.weight"] = path.name
    (source / INDEX).write_text(json.dumps(index))
    assert "has tensors that the architecture does not use: 'model.layers.0.extra.weight'" in refusal(source)


# ---- code


CODE = "open({mark!r}, 'w').write('ran')\nfrom transformers import {base}\nclass Mine({base}):\n    model_type = 'mixtral'\n"


@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_code_beside_a_model_is_never_run(kind: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    """`auto_map` in config.json and tokenizer_config.json names classes in the folder; they are used by those who trust remote code."""
    mark = tmp_path / "mark"
    (source / "mine.py").write_text(CODE.format(mark=str(mark), base="MixtralConfig"))
    (source / "words.py").write_text(CODE.format(mark=str(mark), base="PreTrainedTokenizerFast"))
    changes = {"auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
    says(**changes, **({"model_type": "someones_own"} if kind == "unknown" else {}))(source)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["words.Mine", "words.Mine"]}}))
    options: dict[str, Any] = dict(calibration=[str(text_file)], samples=4, length=32)
    if kind == "unknown":
        assert "cannot read" in refusal(source)
        with pytest.raises(UserError, match="cannot read"):
            trimoe.compress(str(source), UNIFORM, tmp_path / "out", **options)
    else:
        trimoe.inspect(str(source))
        trimoe.compress(str(source), UNIFORM, tmp_path / "out", **options)
        trimoe.evaluate(str(source), text=[str(text_file)], length=32)
        trimoe.load(str(source))
        assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"mine.py", "words.py"}, "a tokenizer names its code"
        assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text()), "the model's class is transformers' own"
    assert not mark.exists()


# ---- tokenizers


def tokenizer_with(source: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = source / "tokenizer.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def large_ids(value: dict[str, Any]) -> None:
    value["model"]["vocab"] = {word: number + (500 if number > 2 else 0) for word, number in value["model"]["vocab"].items()}


def large_end(value: dict[str, Any]) -> None:
    value["model"]["vocab"]["</s>"] = 777
    for added in value["added_tokens"]:
        added["id"] = 777 if added["content"] == "</s>" else added["id"]


@pytest.mark.parametrize(("change", "message"), [(large_ids, "gives token"), (large_end, "ends texts with token 777")])
def test_tokenizers_of_another_model(
    change: Callable[[dict[str, Any]], None], message: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    tokenizer_with(source, change)
    before = snapshot(source)
    with pytest.raises(UserError, match="tokenizer and model do not match") as found:
        trimoe.compress(str(source), UNIFORM, tmp_path / "out", calibration=[str(text_file)], samples=4, length=32)
    assert message in str(found.value)
    assert not (tmp_path / "out").exists() and snapshot(source) == before
