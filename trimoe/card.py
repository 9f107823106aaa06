"""The model card: what was removed, sizes on disk, numbers before and after, the exact command."""

from __future__ import annotations

from typing import Any

import yaml

from trimoe.plan import Plan
from trimoe.skeleton import Skeleton


def text(skeleton: Skeleton, record: dict[str, Any], plan: Plan) -> str:
    """README.md of a finished folder."""
    tags = ["trimoe", "mixture-of-experts", "compressed", *(next(iter(step)) for step in record["recipe"]["steps"])]
    head = yaml.safe_dump({"library_name": "transformers", "base_model": skeleton.name, "tags": tags}, sort_keys=False)
    native = plan.form == "native"
    load = (
        "Layers of this checkpoint differ in shape, so load it with `import trimoe` first, or without trimoe by\n"
        "`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` (the code is `modeling_trimoe.py` in this folder). "
        "Without\neither, transformers refuses it with a size mismatch."
        if native
        else "This is a stock checkpoint: `AutoModelForCausalLM.from_pretrained(folder)`."
    )
    steps = "\n".join(f"- `{next(iter(step))}`: {_fields(next(iter(step.values())))}" for step in record["recipe"]["steps"])
    before, after = plan.before, plan.after
    rows = [
        ("safetensors on disk (bytes)", before.file_bytes, after.file_bytes),
        ("parameters", before.parameters, after.parameters),
        ("parameters active per token", before.active, after.active),
        ("routed-expert parameters", before.experts, after.experts),
    ]
    table = "\n".join(f"| {name} | {a:,} | {b:,} | {b / a:.1%} |" for name, a, b in rows)
    quality, given = record.get("evaluation"), record["calibration"]
    return f"""---
{head}---

# {skeleton.name}, compressed

Made by trimoe {record["trimoe"]} from {skeleton.name}.

{load}

## What was done

{steps}

Calibration: {given["samples"]} samples of {given["length"]} tokens ({", ".join(given["domains"])}), seed {record["seed"]}.

## Size

| | before | after | |
| --- | ---: | ---: | ---: |
{table}

{_quality(quality) if quality else ""}## Command

```
{record["command"]}
```
"""


def _fields(step: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in step.items() if value is not None)


def _quality(report: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {text['name']} | {text['against']['perplexity']:.3f} | {text['perplexity']:.3f} | {text['kl']:.4f} | {text['agreement']:.1%} |"
        for text in report["texts"]
    )
    return f"""## Quality on held-out text

| text | perplexity before | after | KL (nats/token) | top-1 agreement |
| --- | ---: | ---: | ---: | ---: |
{rows}

Perplexity flatters compressed models; look at the KL and at what it generates, too.

"""
