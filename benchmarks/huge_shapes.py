"""inspect and plan of the largest published shapes from headers alone: sparse files, no weights, seconds and peak memory.

    python benchmarks/huge_shapes.py                       # all shapes
    python benchmarks/huge_shapes.py deepseek_v3 kimi_k2   # some of them

Each verb runs on one thread in a process of its own. Printed: seconds by the clock and of the processor (which other work on the machine does
not change), and the peak of resident memory. The exit code is 1 if a verb fails or takes more than it may.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from alternate import table, write_json
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from trimoe.checkpoint.headers import header_bytes

SECONDS, MEMORY = 10, 2 << 30  # of the processor, and bytes, that a verb may take
Entry = tuple[str, tuple[int, ...]]


def deepseek_v3(**changes: Any) -> DeepseekV3Config:
    return DeepseekV3Config(**{"num_nextn_predict_layers": 1, "dtype": "bfloat16", **changes})


def kimi_k2() -> DeepseekV3Config:
    return deepseek_v3(
        n_routed_experts=384, num_attention_heads=64, num_key_value_heads=64, first_k_dense_replace=1, n_group=1, topk_group=1,
        vocab_size=163840, routed_scaling_factor=2.827, num_nextn_predict_layers=0,
    )  # fmt: skip


def qwen3(layers: int, hidden: int, heads: int, width: int, inner: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=width, intermediate_size=inner, vocab_size=151936, max_position_embeddings=40960,
        norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "deepseek_v3": deepseek_v3,
    "kimi_k2": kimi_k2,
    "qwen3_235b": lambda: qwen3(94, 4096, 64, 1536, 12288),
    "qwen3_30b": lambda: qwen3(48, 2048, 32, 768, 6144),
    "gpt_oss_120b": lambda: GptOssConfig(dtype="bfloat16"),
}


def write(config: PreTrainedConfig, folder: Path) -> None:
    """A checkpoint of that shape in bfloat16: headers as they would be, one file a layer, and holes where the tensors are."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    files: dict[str, list[Entry]] = {}
    state = model.state_dict()
    for name, tensor in state.items():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        files.setdefault(layer, []).extend(_on_disk(name, tuple(tensor.shape), stacked=f"{name}_bias" in state))
    last = str(config.num_hidden_layers - 1)
    if getattr(config, "num_nextn_predict_layers", 0):
        files["mtp"] = [(key.replace(f"layers.{last}.", f"layers.{int(last) + 1}."), shape) for key, shape in files[last]]
    weight_map = {}
    for number, entries in enumerate(files.values(), 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        head = header_bytes((key, "BF16", shape) for key, shape in entries)
        with open(folder / file, "wb") as out:
            out.write(head)
            out.truncate(len(head) + sum(2 * torch.Size(shape).numel() for _, shape in entries))
        weight_map |= {key: file for key, _ in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _on_disk(name: str, shape: tuple[int, ...], *, stacked: bool) -> Iterator[Entry]:
    """A parameter's keys in the published form: of Qwen's and DeepSeek's experts one key a matrix, gpt-oss's, which have biases, `stacked`."""
    stem, _, leaf = name.rpartition(".experts.")
    if leaf not in ("gate_up_proj", "down_proj") or stacked:
        yield name, shape
        return
    count, rows, columns = shape
    for expert in range(count):
        for part in ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",):
            yield f"{stem}.experts.{expert}.{part}.weight", (rows // (2 if leaf == "gate_up_proj" else 1), columns)


def measure(*arguments: str) -> dict[str, float]:
    """Runs a verb; its seconds, processor seconds and peak bytes, and its exit code."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimoe.cli", *arguments], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    _, status, used = os.wait4(process.pid, 0)
    return {
        "rc": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - start, "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak": used.ru_maxrss * 1024,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all of them by default")
    parser.add_argument("--recipe", default="moe-i2", help="what is planned")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="huge-shapes-") as folder:
        for shape in options.shapes or SHAPES:
            place = Path(folder) / shape
            write(SHAPES[shape](), place)
            found[f"{shape} inspect"] = measure("inspect", str(place), "--json")
            found[f"{shape} plan"] = measure("plan", str(place), "-r", options.recipe, "--dtype", "bfloat16", "--json")
    rows = [
        {"what": name, "seconds": f"{row['seconds']:.1f}", "of the processor": f"{row['cpu_seconds']:.1f}",
         "GiB": f"{row['peak'] / 2**30:.2f}", "exit": row["rc"]}
        for name, row in found.items()
    ]  # fmt: skip
    print(table(rows))
    write_json(options.json, found)
    return int(any(row["rc"] or row["cpu_seconds"] > SECONDS or row["peak"] > MEMORY for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
