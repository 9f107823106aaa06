"""Every user's mistake: exit code 2, one sentence on standard error, nothing written, the source stays as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from damage import shards
from forks import Forks
from refusals import BASE, FACTORED, Family, Line, recipe_file, refused, snapshot
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from trimoe.text import samples

# ---- the model


def test_missing_and_wrong_folders(line: Line, text_file: Path, tmp_path: Path) -> None:
    refused(line, "There is no folder", tmp_path / "absent", text_file, tmp_path)
    (tmp_path / "empty").mkdir()
    refused(line, "has no config.json", tmp_path / "empty", text_file, tmp_path)
    refused(line, "is a file; give the folder", text_file, text_file, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for command in ("inspect", "eval"):
        line.refused("There is no folder", command, tmp_path / "absent")
        line.refused("holds an adapter, no model: load it onto its base with peft", command, tmp_path / "adapter")
    line.refused("no finished trimoe folder but an adapter's", "report", tmp_path / "adapter")
    line.refused("There is no built-in model 'builtin:big'", "inspect", "builtin:big")
    line.refused("There is no folder", "plan", tmp_path / "absent", "--recipe", "moe-i2")


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"])
def test_float8_without_scales(kind: str, line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    """Whoever strips quantization_config to get around a loader leaves numbers whose scales nobody knows."""
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({k: t.to(getattr(torch, kind)) if "experts" in k else t for k, t in tensors.items()}, path, metadata={"format": "pt"})
    message = "is stored in 8-bit floats (F8_"
    refused(line, message, source, text_file, tmp_path)
    for command in ("inspect", "eval", "bench"):
        line.refused(message, command, source, *(["--text", text_file] if command == "eval" else []))
    line.refused(message, "plan", source, "--recipe", "moe-i2")


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
    go("dtype 'float8' is not one of auto, float32, bfloat16, float16", "--dtype", "float8")


def test_recipe_files_that_mean_harm(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    laughs = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    bodies = {
        "laughs": (laughs, "it has an alias"),
        "large": ("steps: [expert_drop]\n" + "#" * 70_000, "has more than 65,536 bytes, the most that are read"),
        "deep": ("steps: " + "[" * 20_000, "is not valid YAML"),
        "object": ("steps: !!python/object/apply:os.system [ls]", "is not valid YAML"),
        "number": ("steps: " + "9" * 10_000, "is not valid YAML"),
    }
    for name, (body, message) in bodies.items():
        (tmp_path / f"{name}.yaml").write_text(body)
        refused(line, message, source, text_file, tmp_path, recipe=str(tmp_path / f"{name}.yaml"))


def test_keys_given_twice(line: Line, source: Path, text_file: Path, tmp_path: Path) -> None:
    """YAML's readers keep one of them and say nothing."""
    twice = {
        "steps": "steps: [{expert_drop: {ratio: 0.25}}]\nsteps: [{low_rank: {ratio: 0.3}}]\n",
        "ratio": "steps: [{expert_drop: {ratio: 0.25, ratio: 0.5}}]\n",
    }
    for key, body in twice.items():
        (tmp_path / "twice.yaml").write_text(body)
        said = f"line {2 if key == 'steps' else 1} gives the key '{key}' again"
        refused(line, said, source, text_file, tmp_path, recipe=str(tmp_path / "twice.yaml"))
    for body, message in (
        ("steps: [{expert_drop: {<<: {ratio: 0.25}, ratio: 0.5}}]\n", "merges with <<"),
        ("steps: !!map [a, b]\n", "is not valid YAML"),
        ("steps: !!set [a]\n", "is not valid YAML"),
    ):
        (tmp_path / "twice.yaml").write_text(body)
        refused(line, message, source, text_file, tmp_path, recipe=str(tmp_path / "twice.yaml"))
    change = ("--set", "steps.0.ratio=0.5", "--set", "steps.0.ratio=0.75")
    line.refused("--set gives steps.0.ratio twice", "plan", source, "-r", "expert-drop", *change)
    line.refused(
        "--set gives rate twice", "recover", source, "--method", "lora", "-o", tmp_path / "x", "--set", "rate=1", "--set", "rate=2"
    )


def test_one_expert_in_a_stock_folder(line: Line, text_file: Path, tmp_path: Path) -> None:
    """transformers' own configuration cannot say it; a native one can, where some layers keep more."""
    families.save("mixtral", tmp_path / "top1", num_experts_per_tok=1)
    drop = {"steps": [{"expert_drop": {"count": 7, "counts": "uniform", "score": "frequency", "search": "none"}}]}
    refused(line, "leaves one expert in every layer", tmp_path / "top1", text_file, tmp_path, recipe=drop)
    for counts in ("importance", "global"):
        most = {"steps": [{"expert_drop": {"ratio": 0.875, "counts": counts, "score": "frequency", "search": "none"}}]}
        refused(line, "leaves one expert in every layer", tmp_path / "top1", text_file, tmp_path, recipe=most)


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
    twice = ("--text", "builtin:mixed", "--text", "builtin:code")
    line.refused("Two texts to evaluate on are called 'code'", "eval", "builtin:mini-mixtral", *twice, "-q")
    line.refused("--json - would be a file or folder of that name, not standard output", "eval", source, "--json", "-")
    (tmp_path / "folder.txt").mkdir()
    refused(line, "is not a file; a .txt or .jsonl file", source, tmp_path / "folder.txt", tmp_path)
    monkeypatch.setattr(samples, "MAX_LINE", 1000)
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
    refused(line, "is no folder", source, text_file, tmp_path, out=full / "mine.txt")
    refused(line, "is no folder", source, text_file, tmp_path, out=Path("/dev/null"))
    refused(line, "/dev/null is no folder", source, text_file, tmp_path, out=Path("/dev/null/x"))
    long = ("--out", tmp_path / ("x" * 300), "--calibration", text_file, *BASE)
    line.refused("cannot be made: File name too long", "compress", source, "--recipe", "naee", *long)
    refused(line, "is no UTF-8 text", source, text_file, tmp_path, out=tmp_path / "bad\udcff")
    assert not (tmp_path / "bad\udcff").exists()
    (tmp_path / "link").symlink_to(source)
    refused(line, "lies in the source model's folder", source, text_file, tmp_path, out=tmp_path / "link" / "out")


def test_odd_names_of_what_is_written(line: Line, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option that names a file or folder to be made, before any work: what would be tried hours later is refused now."""
    done, recipe = tmp_path / "done", recipe_file(tmp_path)
    text = ("--calibration", text_file, *BASE)
    assert line.run("compress", source, "-r", recipe, "-o", done, *text)[0] == 0
    monkeypatch.chdir(tmp_path)
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    odd = {
        "-": "not standard output",
        "dangling": "is a link to nowhere, which does not exist",
        "dangling/x": "is a link to nowhere, which does not exist",
        "loop": "is a link to loop, which does not exist",
        "x" * 300: "cannot be made: File name too long",
    }
    options: list[tuple[Any, ...]] = [
        ("stats", source, *text, "--out"),
        ("compress", source, "-r", recipe, *text, "--out"),
        ("compress", source, "-r", recipe, *text, "--out", tmp_path / "new", "--json"),
        ("eval", source, "-q", "--json"),
        ("bench", source, "-q", "--json"),
        ("recover", done, "--method", "router", "-q", "-o", tmp_path / "new", "--json"),
        ("sweep", source, "-r", recipe, "-q", "--out"),
        ("report", done, "-q", "--html"),
        ("report", done, "-q", "--figures"),
    ]
    before = snapshot(tmp_path)
    for words in options:
        for name, message in odd.items():
            line.refused(message, *words, name)
    line.refused("is the folder that --out makes", *options[1], tmp_path / "new", "--json", "new")
    line.refused("are both to be", "report", done, "-q", "--html", "one.html", "--figures", "one.html")
    assert snapshot(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_one_line_in_a_process_of_its_own(family: str, family_folder: Family, text_file: Path, with_trimoe: Forks, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path, {"steps": [{"expert_drop": {"ratio": 0.95}}]})
    command = ["compress", family_folder(family), "--recipe", recipe, "--out", tmp_path / "out", "--calibration", text_file, *BASE]
    done = with_trimoe.run("-m", "trimoe.cli", *command)
    assert (done.returncode, done.stdout) == (2, "")
    assert not (tmp_path / "out").exists()
    assert [entry.partition(":")[0] for entry in done.stderr.splitlines()] == ["trimoe"], done.stderr
