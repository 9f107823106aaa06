"""Which files differ when the same compression runs twice, or on another number of threads, and by how much.

    python benchmarks/determinism.py                                  # every built-in recipe without recovery, on the built-in model
    python benchmarks/determinism.py --hidden 1024 --recipe moe-i2    # random weights of that width

All runs in one process (tests/test_determinism.py starts new ones). Printed for each recipe: whether decisions and every byte are the same,
which files are not, and of tensors that are not the largest difference, relative to the tensor's largest number.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import random_model
import torch
from alternate import table, write_json
from safetensors import safe_open

import trimoe

RUNS = (1, 1, 2)  # threads; the first is what the others are compared with
LOG = "trimoe.log"  # says when things happened
BUILTIN = (
    "expert-drop", "naee", "layer-drop", "block-drop", "layer-drop-int4", "low-rank", "moe-i2-prune-only", "moe-i2", "moe-pruner", "wanda", "sparsegpt",
    "slim-int4",
)  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "drop by leave_one_out, no search": {"steps": [{"expert_drop": {"ratio": 0.25, "search": "none"}}]},
    "drop by reap": {"steps": [{"expert_drop": {"ratio": 0.25, "score": "reap", "search": "none"}}]},
    "drop, counts optimal": {"steps": [{"expert_drop": {"ratio": 0.25, "counts": "optimal", "search": "greedy"}}]},
    "block_drop": {"steps": [{"block_drop": {"count": 1}}]},
    "round to 4 bits": {"steps": [{"quantize": {"method": "round", "group": 32}}]},
    "awq": {"steps": [{"quantize": {"method": "awq", "group": 32}}]},
    "magnitude": {"steps": [{"weight_prune": {"ratio": 0.5, "score": "magnitude"}}]},
    "wanda": {"steps": [{"weight_prune": {"ratio": 0.5, "score": "wanda"}}]},
    "sparsegpt": {"steps": [{"weight_prune": {"ratio": 0.5, "score": "sparsegpt"}}]},
}


def compressed(model: str, recipe: Any, out: Path, threads: int, options: dict[str, Any]) -> None:
    torch.set_num_threads(threads)
    trimoe.compress(model, recipe, out, command="determinism", **options)


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if name != LOG}


def largest_difference(one: Path, other: Path) -> tuple[int, float]:
    """(how many tensors differ, the largest difference relative to the tensor's largest number)."""
    count, worst = 0, 0.0
    for shard in sorted(one.glob("*.safetensors")):
        if not (other / shard.name).is_file():
            return -1, float("inf")
        with safe_open(shard, "pt") as a, safe_open(other / shard.name, "pt") as b:
            if set(a.keys()) != set(b.keys()):
                return -1, float("inf")
            for key in a.keys():  # noqa: SIM118
                x, y = a.get_tensor(key), b.get_tensor(key)
                if x.shape != y.shape:
                    return -1, float("inf")
                if not torch.equal(x, y):
                    count += 1
                    worst = max(worst, float((x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-30)))
    return count, worst


def compared(first: Path, other: Path) -> dict[str, str]:
    a, b = files(first), files(other)
    if a == b:
        return {"bytes": "same", "differ": "", "decisions": "same", "tensors": ""}
    differ = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    reports = [json.loads((folder / "trimoe.json").read_text()) for folder in (first, other)]
    count, worst = largest_difference(first, other)
    return {
        "bytes": "differ", "differ": ", ".join(differ), "decisions": "same" if reports[0]["decisions"] == reports[1]["decisions"] else "differ",
        "tensors": f"{count} by up to {worst:.1e}" if count else "all the same",
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--recipe", action="append", help="built-in name or one of: " + "; ".join(MORE))
    arguments.add_argument("--hidden", type=int, help="random qwen3_moe of this width, instead of builtin:mini-mixtral")
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--set", action="append", default=[])
    arguments.add_argument("--json")
    given = arguments.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model = "builtin:mini-mixtral"
        if given.hidden:
            config = random_model.config_of(
                layers=2, experts=8, hidden=given.hidden, width=given.hidden, top_k=2, vocabulary=96, context=512
            )
            model = str(Path(scratch, "model"))
            Path(model).mkdir()
            random_model.save(config, Path(model))
        for number, name in enumerate(given.recipe or (*BUILTIN, *MORE)):
            options = {"samples": given.samples, "length": given.length, "changes": given.set}
            folders = [Path(scratch, f"{number}-{run}") for run in range(len(RUNS))]
            for threads, folder in zip(RUNS, folders, strict=True):
                compressed(model, MORE.get(name, name), folder, threads, options)
            for threads, folder in zip(RUNS[1:], folders[1:], strict=True):
                rows.append({"recipe": name, "threads": f"{RUNS[0]} and {threads}", **compared(folders[0], folder)})
                print(rows[-1], flush=True)
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
