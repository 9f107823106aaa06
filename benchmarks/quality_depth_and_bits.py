"""Dropping experts, MoE sub-layers and decoder layers, alone and with 4-bit experts: bytes, held-out perplexity and KL, by share removed.

    python benchmarks/quality_depth_and_bits.py --model builtin:mini-mixtral --calibration A.jsonl B.jsonl --text C.jsonl D.txt

Every result is really written and evaluated from disk. KL(original || compressed) in nats per token, mean over texts; one shot.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import trimoe

INT4 = {"quantize": {"bits": 4}}


def rows() -> dict[str, list[dict[str, Any]]]:
    drops: dict[str, dict[str, Any]] = {}
    for share in (0.125, 0.25, 0.5):
        drops[f"expert drop {share:.1%}, gate"] = {"expert_drop": {"ratio": share, "score": "gate", "counts": "uniform"}}
        drops[f"expert drop {share:.1%}, search"] = {"expert_drop": {"ratio": share, "counts": "uniform", "search": "greedy"}}
        drops[f"expert drop {share:.1%}, gate, global"] = {"expert_drop": {"ratio": share, "score": "gate", "counts": "global"}}
        drops[f"layer drop {share:.1%}"] = {"layer_drop": {"ratio": share}}
        drops[f"layer drop {share:.1%}, metric output"] = {"layer_drop": {"ratio": share, "metric": "output"}}
        drops[f"layer drop {share:.1%}, rerank kl"] = {"layer_drop": {"ratio": share, "rerank": "kl"}}
        drops[f"block drop {share:.1%}"] = {"block_drop": {"ratio": share}}
        drops[f"block drop {share:.1%}, consecutive"] = {"block_drop": {"ratio": share, "choose": "consecutive"}}
        drops[f"block drop {share:.1%}, rerank kl"] = {"block_drop": {"ratio": share, "rerank": "kl"}}
    table = {"int8 round": [{"quantize": {"bits": 8, "method": "round"}}]}
    table |= {f"int4 {method}": [{"quantize": {"bits": 4, "method": method}}] for method in ("round", "awq", "gptq")}
    for name, step in drops.items():
        table[name] = [step]
        if not any(word in name for word in ("global", "output", "consecutive")):
            table[name + " + int4"] = [step, INT4]
    table["4 sub-layers, mixed, rerank kl"] = [{"layer_drop": {"count": 4, "blocks": True, "rerank": "kl"}}]
    return table


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="builtin:mini-mixtral")
    arguments.add_argument("--calibration", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--text", nargs="+", default=["builtin:mixed"])
    arguments.add_argument("--samples", type=int, default=48)
    arguments.add_argument("--tokens", type=int, default=4096)
    arguments.add_argument("--only", nargs="*", help="of the rows, those whose names contain one of these")
    arguments.add_argument("--json")
    given = arguments.parse_args()
    results = []
    for name, steps in rows().items():
        if given.only and not any(word in name for word in given.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            made = trimoe.compress(given.model, {"steps": steps}, out, calibration=given.calibration, samples=given.samples)
            report = trimoe.evaluate(out, against=given.model, text=given.text, stride=256, tokens=given.tokens)
        share = made.plan.after.file_bytes / made.plan.before.file_bytes
        gone = [index for index, decision in made.decisions.items() if decision.gone]
        kls, perplexity = [row["kl"] for row in report["texts"]], [row["perplexity"] for row in report["texts"]]
        results.append(
            {"model": given.model, "row": name, "bytes": share, "kl": report["mean_kl"], "kls": kls, "perplexity": perplexity, "gone": gone}
        )
        numbers = " ".join(f"{value:.2f}" for value in perplexity)
        print(f"{name:<42} bytes {share:6.1%}  KL {report['mean_kl']:.4f}  perplexity {numbers}  {gone or ''}", flush=True)
    if given.json:
        Path(given.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
