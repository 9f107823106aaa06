"""What dropped layers, packed experts and low-rank experts give in speed and memory on this machine, against the original in turns.

    python benchmarks/speed.py

A random qwen3_moe checkpoint of Mixtral's proportions (H 2048, I 5632, 8 experts, 2 a token; 4.6 GB in float32), compressed by the
recipes named below (`method: round`, because speed does not depend on the values), each measured against the original in its faster
precision by `trimoe.bench`. Beside every decode ratio stands what memory bandwidth allows: the bytes of weights that one token reads in
the original, over those in the compressed model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import random_model
import torch
from alternate import table, write_json
from safetensors.torch import load_file, save_file

import trimoe
from trimoe.model.skeleton import Skeleton

ROUND = "steps.1.method=round"
ALL = "steps.1.scope=all-linear"
VARIANTS: list[tuple[str, str, str, Any, list[str]]] = [
    # name, source (empty: the faster one), backend, recipe, changes
    ("layer-drop-int4, int8-dynamic, the rest in float32", "float32", "int8-dynamic", "layer-drop-int4", [ROUND, "steps.0.rerank=none"]),
    ("layer-drop-int4, int8-dynamic, the rest in bfloat16", "bfloat16", "int8-dynamic", "layer-drop-int4", [ROUND, "steps.0.rerank=none"]),
    ("layer-drop-int4, int4-weight-only", "bfloat16", "int4-weight-only", "layer-drop-int4", [ROUND, "steps.0.rerank=none"]),
    ("layer-drop-int4 of all matrices, int8-dynamic", "float32", "int8-dynamic", "layer-drop-int4", [ROUND, ALL, "steps.0.rerank=none"]),
    ("layer-drop-int4 of all matrices, int4-weight-only", "bfloat16", "int4-weight-only", "layer-drop-int4", [ROUND, ALL, "steps.0.rerank=none"]),
    ("slim-int8, int8-dynamic", "float32", "int8-dynamic", "slim-int8", []),
    ("slim-int4, int4-weight-only", "bfloat16", "int4-weight-only", "slim-int4", ["steps.0.method=round"]),
    ("layer-drop", "", "auto", "layer-drop", ["steps.0.rerank=none"]),
    ("low-rank, half the expert parameters", "", "auto", {"steps": [{"low_rank": {"ratio": 0.5, "rank": "uniform", "whiten": "none"}}]}, []),
]  # fmt: skip


def in_bfloat16(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            save_file({k: t.bfloat16() for k, t in load_file(path).items()}, target / path.name, metadata={"format": "pt"})
        else:
            (target / path.name).write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))


def bytes_per_token(folder: str, weight_bits: int | None) -> float:
    """Bytes of weights that one token reads, packed matrices in `weight_bits` each: everything but the embedding table and the experts that
    are not chosen."""
    skeleton = Skeleton.of(folder)
    read = {
        key: math.prod(info.shape) * weight_bits / 8 if weight_bits and key not in skeleton.checkpoint.stored else info.nbytes
        for key, info in skeleton.checkpoint.tensors.items()
    }
    total = sum(count for key, count in read.items() if "embed_tokens" not in key)
    for index, site in skeleton.sites.items():
        prefix = f"{skeleton.layer_name(index)}.{site.block}.{site.experts}."
        here = sum(read[key] for name, found in skeleton.conversion.source_of.items() if name.startswith(prefix) for key in found)
        total -= here * (1 - site.rule.top_k / site.num_experts)
    return total


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 4), ("experts", 8), ("hidden", 2048), ("width", 5632), ("top-k", 2), ("vocabulary", 4096)):
        arguments.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("prompt", 128), ("generate", 32), ("batch", 1), ("rounds", 5), ("threads", torch.get_num_threads())):
        arguments.add_argument(f"--{name}", type=int, default=value)
    arguments.add_argument("--only", nargs="*", help="of the variants, those whose names contain one of these")
    arguments.add_argument("--folder", help="where models go (default: a temporary folder)")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    config = random_model.config_of(
        layers=given.layers, experts=given.experts, hidden=given.hidden, width=given.width, top_k=given.top_k,
        vocabulary=given.vocabulary, context=1024,
    )  # fmt: skip
    options = dict(prompt=given.prompt, generate=given.generate, batch=given.batch, rounds=given.rounds)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        sources = {name: Path(folder, name) for name in ("float32", "bfloat16")}
        for path in sources.values():
            path.mkdir()
        random_model.save(config, sources["float32"])
        in_bfloat16(sources["float32"], sources["bfloat16"])
        rows, reports = [], {}
        first = trimoe.bench(sources["bfloat16"], sources["float32"], **options)
        reports["bfloat16 original"] = first
        faster = "bfloat16" if first["ratio"]["decode_tokens_s"]["median"] > 1 else "float32"
        read = bytes_per_token(str(sources["bfloat16"]), None) / bytes_per_token(str(sources["float32"]), None)
        rows.append(_row("bfloat16 / float32 original", first, 0.5, read))
        for name, source, backend, recipe, changes in VARIANTS:
            if given.only and not any(word in name for word in given.only):
                continue
            out = Path(folder, "out")
            trimoe.compress(sources[source or faster], recipe, out, changes=changes, samples=4, length=128)
            report = trimoe.bench(out, sources[faster], backend=backend, **options)
            bits = 8 if backend == "int8-dynamic" else 4 if backend == "int4-weight-only" else None
            rows.append(
                _row(
                    name,
                    report,
                    report["ratio"]["disk_bytes"],
                    bytes_per_token(str(out), bits) / bytes_per_token(str(sources[faster]), None),
                )
            )
            reports[name] = report
            print(table(rows[-1:]), flush=True)
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink()
            out.rmdir()
    print(f"\nThe original runs faster in {faster} here; the ratios of compressed models are against that.\n\n" + table(rows))
    write_json(given.json, {"faster": faster, "rows": rows, "reports": reports})


def _row(name: str, report: dict[str, Any], disk: float, read: float) -> dict[str, Any]:
    ratio, (ours, theirs) = report["ratio"], report["models"]
    spread = {
        key: f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})" for key, value in ratio.items() if isinstance(value, dict)
    }
    memory = (ours["resident_bytes"] - ours["before_bytes"]) / (theirs["resident_bytes"] - theirs["before_bytes"])
    return {
        "model": name, "decode": spread["decode_tokens_s"], "bandwidth allows": f"{1 / read:.2f}", "prefill": spread["prefill_tokens_s"],
        "first token": spread["first_token_s"], "memory": f"{memory:.3f}", "disk": f"{disk:.3f}",
        "tokens/s": f"{ours['decode_tokens_s']['median']:.1f} / {theirs['decode_tokens_s']['median']:.1f}",
    }  # fmt: skip


if __name__ == "__main__":
    main()
