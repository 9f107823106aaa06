"""Every user's mistake: exit code 2, one sentence on standard error, nothing written, the source stays as it was."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import transformers
from transformers import AutoConfig

from trimoe import calibration, card, cli, progress
from trimoe.checkpoint import Checkpoint
from trimoe.errors import UserError
from trimoe.progress import LOG

BASE = ["--samples", "4", "--length", "32", "--quiet"]
UNIFORM = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}]}
FACTORED = {"steps": [*UNIFORM["steps"], {"low_rank": {"ratio": 0.3, "rank": "importance"}}]}
Family = Callable[[str], Path]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder but the log, and what is in it."""
    files = sorted(path for path in (folder, *folder.rglob("*")) if path.is_file() and path.name != LOG)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Line:
    """The command line in this process: exit code, standard output, standard error (transformers' log lines included)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def run(self, *arguments: Any) -> tuple[int, str, str]:
        self.capsys.readouterr()
        code: Any = 0
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["trimoe", *map(str, arguments)])
            patch.setattr(progress, "PLAIN_EVERY", 1e9)  # a busy machine makes any stage long
            for handler in logging.getLogger("transformers").handlers:
                if isinstance(handler, logging.StreamHandler):
                    patch.setattr(handler, "stream", sys.stderr)
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
        return code, *self.capsys.readouterr()

    def refused(self, message: str, *arguments: Any) -> None:
        code, out, err = self.run(*arguments)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, (code, err)
        assert len(lines) == 1 and lines[0].startswith("trimoe: "), err
        assert message in lines[0], err
        assert out == ""


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    return Line(monkeypatch, capsys)


@pytest.fixture
def source(family_folder: Family, tmp_path: Path) -> Path:
    """A copy of the tiny mixtral that a test may damage."""
    return Path(shutil.copytree(family_folder("mixtral"), tmp_path / "source"))


def recipe_file(folder: Path, recipe: dict[str, Any] = UNIFORM) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def refused(
    line: Line, message: str, source: Path, text: Path, tmp_path: Path, *more: Any, recipe: Any = None, out: Path | None = None
) -> None:
    """`trimoe compress` says `message`; the output folder does not exist afterwards and the source is as it was."""
    before, target = snapshot(source), out or tmp_path / "out"
    given, before_out = target.exists(), snapshot(target)
    chosen = recipe if isinstance(recipe, str) else recipe_file(tmp_path, recipe or UNIFORM)
    line.refused(message, "compress", source, "--recipe", chosen, "--out", target, "--calibration", text, *BASE, *more)
    assert (target.exists(), snapshot(target)) == (given, before_out)
    assert snapshot(source) == before


# ---- the model


def test_missing_and_wrong_folders(line: Line, text_file: Path, tmp_path: Path) -> None:
    refused(line, "There is no folder", tmp_path / "absent", text_file, tmp_path)
    (tmp_path / "empty").mkdir()
    refused(line, "has no config.json", tmp_path / "empty", text_file, tmp_path)
    refused(line, "is a file; give the folder", text_file, text_file, tmp_path)
    for command in ("inspect", "eval"):
        line.refused("There is no folder", command, tmp_path / "absent")
    line.refused("There is no built-in model 'builtin:big'", "inspect", "builtin:big")
    line.refused("There is no folder", "plan", tmp_path / "absent", "--recipe", "moe-i2")


def other_model(folder: Path, kind: str, **fields: Any) -> Path:
    """A saved tiny model of an architecture that is no supported MoE."""
    config = AutoConfig.for_model(kind, **fields)
    auto = transformers.AutoModelForCausalLM if type(config) in transformers.AutoModelForCausalLM._model_mapping else transformers.AutoModel
    auto.from_config(config).save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


TINY = {
    key: families.SMALL[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
}
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({**TINY, "intermediate_size": 40}, "(llama) is not a Mixture-of-Experts model"),
    "dbrx": (
        {"vocab_size": 96, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
        "(dbrx)",
    ),
    "jetmoe": (
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 24,
         "num_local_experts": 4, "num_experts_per_tok": 2},
        "(jetmoe)",
    ),
    "llama4_text": (
        {**TINY, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8},
        "(llama4_text)",
    ),
    "switch_transformers": (
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "num_experts": 4},
        "(switch_transformers)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_unsupported_architectures_are_refused_by_name(kind: str, line: Line, text_file: Path, tmp_path: Path) -> None:
    fields, message = OTHERS[kind]
    folder = other_model(tmp_path / "model", kind, **fields)
    refused(line, message, folder, text_file, tmp_path)


def test_quantised_sources_are_refused(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(config))
    refused(line, "is already quantised (gptq)", source, text_file, tmp_path)


# ---- files that lie


def shards(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


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


def says(**fields: Any) -> Callable[[Path], None]:
    """A configuration with other values."""

    def change(source: Path) -> None:
        path = source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

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
    "forgetting-index": (lambda s: to_index(s, forget), "lacks 'model.norm.weight'"),
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
    """Seen when the tensor is read: by then the journal lies in the output folder, but nothing of a model does."""
    poison(value, key)(source)
    out = tmp_path / "out"
    line.refused(
        f"the tensor '{key}", "compress", source, "--recipe", recipe_file(tmp_path), "--out", out, "--calibration", text_file, *BASE
    )
    assert {path.name for path in out.iterdir()} <= {".trimoe", LOG}
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


def test_names_do_not_speak_in_the_model_card() -> None:
    name = "</script>`x`\n---\n# [a](http://b)|"
    assert card._escaped(name) == "\\</script\\>\\`x\\` --- # \\[a\\](http://b)\\|"
    assert card._code(name) == "`` </script>`x` --- # [a](http://b)| ``"
    assert card._fenced("a\n```\nb").splitlines()[0] == "````"


# ---- recipes and texts


def test_recipes_that_cannot_be(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    go = lambda message, *more, **options: refused(line, message, source, text_file, tmp_path, *more, **options)  # noqa: E731
    go("no built-in recipe 'moe-i3' (did you mean moe-i2?)", recipe="moe-i3")
    go("known: ratio, count, score, counts, search", recipe={"steps": [{"expert_drop": {"ratoi": 0.5}}]})
    go("its router needs at least 2 (top-2), so at most 6 can go", recipe={"steps": [{"expert_drop": {"ratio": 0.9}}]})
    go("its router needs at least 2 (top-2)", recipe={"steps": [{"expert_drop": {"count": 7, "counts": "uniform"}}]})
    go("expert_drop: give ratio or count.", recipe={"steps": ["expert_drop"]})
    go("expert_drop: give ratio or count, not both.", recipe={"steps": [{"expert_drop": {"ratio": 0.25, "count": 2, "counts": "uniform"}}]})
    go("layer_drop: give one of ratio, count and threshold.", recipe={"steps": ["layer_drop"]})
    go("has no '='", "--set", "steps.0.ratio")
    go("has no field 'rank'", "--set", "steps.0.rank=3")
    go("numbered from 0; '4' is none of them", "--set", "steps.4.ratio=0.1")
    go("drop experts before low_rank", recipe={"steps": [FACTORED["steps"][1], FACTORED["steps"][0]]})
    go("leaves rank", recipe={"steps": [{"low_rank": {"ratio": 0.9}}]})
    go("target is vllm", recipe={**FACTORED, "target": "vllm"})
    go("target is vllm", recipe={"steps": [{"expert_drop": {"ratio": 0.3, "counts": "uniform"}}], "target": "vllm"})
    go(
        "more than its limit of 3",
        recipe={"steps": [{"expert_drop": {"count": 2, "counts": "uniform", "search": {"exhaustive": {"limit": 3}}}}]},
    )
    go("dtype 'float8' is not one of float32, bfloat16, float16", "--dtype", "float8")


def test_recipe_files_that_mean_harm(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    bodies = {
        "laughs": (laughs, "it has an alias"),
        "large": ("steps: [expert_drop]\n" + "#" * 70_000, "at most 65,536 are read"),
        "deep": ("steps: " + "[" * 20_000, "is not valid YAML"),
        "object": ("steps: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        "number": ("steps: " + "9" * 10_000, "is not valid YAML"),
    }
    for name, (body, message) in bodies.items():
        (tmp_path / f"{name}.yaml").write_text(body)
        refused(line, message, source, text_file, tmp_path, recipe=str(tmp_path / f"{name}.yaml"))


def test_ratios_that_break_router_groups(line: Line, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    folder = family_folder("deepseek_v3")
    refused(line, "in 2 router groups", folder, text_file, tmp_path, recipe={"steps": [{"expert_drop": {"count": 1, "counts": "uniform"}}]})
    refused(
        line, "needs at least 4", folder, text_file, tmp_path, recipe={"steps": [{"expert_drop": {"ratio": 0.75, "counts": "uniform"}}]}
    )


def test_texts_that_cannot_be(line: Line, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "short.txt": (b"abc " * 4, "has 17 tokens, fewer than one sample of 32"),
        "empty.txt": (b"", "has fewer tokens than one sample of 32"),
        "binary.txt": (bytes(range(256)) * 9, "is not UTF-8 text"),
        "binary.jsonl": (b'{"text": "\xff"}\n' * 9, "is not UTF-8 text"),
        "fields.jsonl": (b'{"text": "abc"}\n{"content": "x"}\n', 'line 2 is not a JSON object with a "text" field'),
        "list.jsonl": (b"[1, 2]\n" * 9, "line 1 is not a JSON object"),
        "number.jsonl": (b'{"text": 5}\n' * 9, "field that holds text"),
        "nul.txt": (b"abc\0def" * 100, "has NUL bytes"),
        "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1 is not a JSON object"),
        "half.jsonl": (b'{"text": "\\ud800"}\n' * 9, "field that holds text"),
        "broken.jsonl": (b'{"text": \n' * 9, "line 1 is not a JSON object"),
    }
    for name, (data, message) in texts.items():
        (tmp_path / name).write_bytes(data)
        refused(line, message, source, tmp_path / name, tmp_path)
    line.refused("is not UTF-8 text", "eval", source, "--text", tmp_path / "binary.txt", "--quiet")
    (tmp_path / "folder.txt").mkdir()
    refused(line, "is not a file; a .txt or .jsonl file", source, tmp_path / "folder.txt", tmp_path)
    monkeypatch.setattr(calibration, "MAX_LINE", 1000)
    (tmp_path / "long.jsonl").write_text('{"text": "' + "x" * 2000 + '"}')
    refused(line, "line 1 has more than 1,000 characters", source, tmp_path / "long.jsonl", tmp_path)
    (tmp_path / "long.txt").write_text("x" * 2000)
    refused(line, "at most 1,000 are read as one text", source, tmp_path / "long.txt", tmp_path)
    refused(line, "There is no text file", source, tmp_path / "absent.txt", tmp_path)
    refused(line, "There is no built-in text 'builtin:latin'", source, Path("builtin:latin"), tmp_path)


def test_statistics_that_do_not_belong(line: Line, source: Path, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    file, common = tmp_path / "other.stats", ["--calibration", text_file, *BASE]
    assert line.run("stats", family_folder("qwen3_moe"), "--out", file, *common)[0] == 0
    refused(line, "was made for another model", source, text_file, tmp_path, "--stats", file)
    line.refused("exists already", "stats", family_folder("qwen3_moe"), "--out", file, *common)
    mine = tmp_path / "mine.stats"
    assert line.run("stats", source, "--out", mine, *common, "--seed", 1)[0] == 0
    refused(line, "was made for another calibration", source, text_file, tmp_path, "--stats", mine)
    refused(line, "is not a statistics file", source, text_file, tmp_path, "--stats", shards(source)[0])
    refused(line, "is not a statistics file", source, text_file, tmp_path, "--stats", tmp_path / "absent.stats")
    whole = mine.read_bytes()
    for data in (whole[:-100], whole.replace(b'"0.count_E"', b'"x.count_E"'), whole.replace(b'"0.count_E"', b'"9.count_E"'), b""):
        mine.write_bytes(data)
        refused(line, "statistics file", source, text_file, tmp_path, "--stats", mine, "--seed", 1)


# ---- where the result goes


def test_output_folders_that_cannot_be(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    refused(line, "is not empty", source, text_file, tmp_path, out=full)
    refused(line, "lies in the source model's folder", source, text_file, tmp_path, out=source)
    refused(line, "lies in the source model's folder", source, text_file, tmp_path, out=source / "deep" / "out")
    refused(line, "is a file", source, text_file, tmp_path, out=full / "mine.txt")
    (tmp_path / "link").symlink_to(source)
    refused(line, "lies in the source model's folder", source, text_file, tmp_path, out=tmp_path / "link" / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_line_in_a_process_of_its_own(family: str, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, {"steps": [{"expert_drop": {"ratio": 0.95}}]})
    command = ["compress", family_folder(family), "--recipe", recipe, "--out", tmp_path / "out", "--calibration", text_file, *BASE]
    done = subprocess.run([sys.executable, "-m", "trimoe.cli", *map(str, command)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "out").exists()
    assert [entry.partition(":")[0] for entry in done.stderr.splitlines()] == ["trimoe"], done.stderr
