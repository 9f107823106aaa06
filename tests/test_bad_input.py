"""Every user's mistake: exit code 2, one sentence on standard error, nothing written, the source stays as it was."""

from __future__ import annotations

import hashlib
import json
import logging
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

from trimoe import cli

BASE = ["--samples", "4", "--length", "32", "--quiet"]
UNIFORM = {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "uniform", "search": "greedy"}}]}
FACTORED = {"steps": [*UNIFORM["steps"], {"low_rank": {"ratio": 0.3, "rank": "importance"}}]}
Family = Callable[[str], Path]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder and what is in it."""
    files = sorted(path for path in (folder, *folder.rglob("*")) if path.is_file())
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
    "pickle": (pickle_only, "holds pickled .bin weights"),
    "bad-config": (lambda s: (s / "config.json").write_text("{"), "is not valid JSON"),
    "list-config": (lambda s: (s / "config.json").write_text("[]"), "a JSON object is expected"),
    "unknown-type": (lambda s: (s / "config.json").write_text('{"model_type": "nothing"}'), "cannot read"),
    "other-config": (more_experts, "does not fit"),
    "no-tokenizer": (lambda s: [path.unlink() for path in s.glob("tokenizer*")], "has no tokenizer"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(damage: str, line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    change(source)
    refused(line, message, source, text_file, tmp_path)


# ---- recipes and texts


def test_recipes_that_cannot_be(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    go = lambda message, *more, **options: refused(line, message, source, text_file, tmp_path, *more, **options)  # noqa: E731
    go("no built-in recipe 'moe-i3' (did you mean moe-i2?)", recipe="moe-i3")
    go("known: ratio, count, score, counts, search", recipe={"steps": [{"expert_drop": {"ratoi": 0.5}}]})
    go("its router needs at least 2 (top-2), so at most 6 can go", recipe={"steps": [{"expert_drop": {"ratio": 0.9}}]})
    go("its router needs at least 2 (top-2)", recipe={"steps": [{"expert_drop": {"count": 7, "counts": "uniform"}}]})
    go("give either ratio or count, not neither", recipe={"steps": ["expert_drop"]})
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


def test_ratios_that_break_router_groups(line: Line, family_folder: Family, text_file: Path, tmp_path: Path) -> None:
    folder = family_folder("deepseek_v3")
    refused(line, "in 2 router groups", folder, text_file, tmp_path, recipe={"steps": [{"expert_drop": {"count": 1, "counts": "uniform"}}]})
    refused(
        line, "needs at least 4", folder, text_file, tmp_path, recipe={"steps": [{"expert_drop": {"ratio": 0.75, "counts": "uniform"}}]}
    )


def test_texts_that_cannot_be(line: Line, source: Path, tmp_path: Path) -> None:
    texts = {
        "short.txt": (b"abc", "has 4 tokens, fewer than one sample of 32"),
        "empty.txt": (b"", "has 0 tokens"),
        "binary.txt": (bytes(range(256)) * 9, "is not UTF-8 text"),
        "binary.jsonl": (b'{"text": "\xff"}\n', "is not UTF-8 text"),
        "fields.jsonl": (b'{"text": "abc"}\n{"content": "x"}\n', 'line 2 is not a JSON object with a "text" field'),
        "list.jsonl": (b"[1, 2]\n", "line 1 is not a JSON object"),
        "number.jsonl": (b'{"text": 5}\n', "field that holds text"),
        "broken.jsonl": (b'{"text": \n', "line 1 is not a JSON object"),
    }
    for name, (data, message) in texts.items():
        (tmp_path / name).write_bytes(data)
        refused(line, message, source, tmp_path / name, tmp_path)
    refused(line, "There is no text file", source, tmp_path / "absent.txt", tmp_path)
    refused(line, "There is no built-in text 'builtin:latin'", source, Path("builtin:latin"), tmp_path)
    line.refused("is not UTF-8 text", "eval", source, "--text", tmp_path / "binary.txt", "--quiet")


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
