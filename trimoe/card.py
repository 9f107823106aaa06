"""The model card of a finished folder: what was removed, sizes on disk, numbers before and after, the exact command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from trimoe.tables import traffic_cells
from trimoe.write import write_text

NATIVE = """Stock code does not know the form of this checkpoint. Load it with `import trimoe` and then `AutoModelForCausalLM.from_pretrained(folder)` (or
`trimoe.load(folder)`); without trimoe by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, which runs
`modeling_trimoe.py` of this folder. Otherwise transformers refuses it with a size mismatch."""
GONE = {"moe": "sub-layer dropped", "block": "layer dropped"}
PACKED = """ Its experts are packed integers (compressed-tensors): with compressed-tensors installed transformers unpacks
them as it loads; `trimoe.load(folder)` runs them packed."""
SQUEEZED = """ Zeros of pruned matrices are left out of its files and put back while it is loaded."""
STOCK = "This is a stock checkpoint: `AutoModelForCausalLM.from_pretrained(folder)`."


def text(record: dict[str, Any]) -> str:
    """README.md, from what trimoe.json holds."""
    plan, given, model = record["plan"], record["calibration"], record["model"]
    steps = [next(iter(step.items())) for step in record["recipe"]["steps"]]
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["trimoe", "mixture-of-experts", *(name for name, _ in steps)]}
    if model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists():
        head["base_model"] = model  # a hub id
    before, after = plan["before"], plan["after"]
    sizes = [
        ("safetensors on disk (bytes)", "file_bytes"), ("parameters", "parameters"), ("parameters active per token", "active"),
        ("routed-expert parameters", "experts"),
    ]  # fmt: skip
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {_escaped(Path(model).name or model)}, compressed",
        f"Made by trimoe {record['trimoe']} from {_code(model)}.",
        (NATIVE if plan["form"] == "native" else STOCK)
        + (PACKED if any(name == "quantize" for name, _ in steps) else "")
        + (SQUEEZED if any(fields.get("form") == "bitmask" for _, fields in steps) else ""),
        "## What was done",
        "\n".join(f"- `{name}`: {_fields(fields)}" for name, fields in steps),
        f"Calibration: {given['samples']} samples of {given['length']} tokens ({_escaped(', '.join(given['domains']))}), seed {record['seed']}.",
        _table(
            ("layer", "experts before", "after", "mean rank, first / last projection"),
            [(row["layer"], row["experts"], GONE.get(row.get("gone"), row["kept"]), row["rank"] or "-") for row in plan["layers"]],
        ),
        "## Size",
        _table(
            ("", "before", "after", "share"),
            [(name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}") for name, key in sizes],
        ),
        *_traffic(record.get("evaluation")),
        "## Quality on held-out text",
        _quality(record.get("evaluation")),
        f"## Command\n\n{_fenced(record['command'])}\n",
        *(recovered(entry) for entry in record.get("recovered", ())),
    ]
    return "\n\n".join(parts)


def recovered(entry: dict[str, Any]) -> str:
    """For the model card: one recovery, and what held-out text said before and after."""
    metrics, data = entry["metrics"], entry["data"]
    names = list(metrics["before"])
    lines = ["| held-out text | before | after |", "| --- | --- | --- |"]
    lines += [f"| {name.replace('_', ' ')} | {metrics['before'][name]:.4g} | {metrics['after'][name]:.4g} |" for name in names]
    text = f"{data['samples']} samples of {data['length']} tokens ({_escaped(', '.join(data['domains']))}), {data['held']} more held out"
    what = f"Trained by `{entry['method']}`" + (f" from {_code(entry['teacher'])}" if entry["teacher"] else "") + f" on {text}."
    return "## Recovered\n\n" + what + "\n\n" + "\n".join(lines) + f"\n\n{_fenced(entry['command'])}\n"


def made_from(folder: Path) -> str | None:
    """The model that a finished trimoe folder was made from, as it is recorded; None for other folders."""
    path = folder / "trimoe.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model") if path.is_file() else None


def add_evaluation(folder: Path, report: dict[str, Any]) -> None:
    """Put the numbers of an evaluation against the original into a finished folder's trimoe.json and README.md."""
    record = json.loads((folder / "trimoe.json").read_text(encoding="utf-8"))
    record["evaluation"] = report
    write_text(folder / "trimoe.json", json.dumps(record, indent=1) + "\n")
    write_text(folder / "README.md", text(record))


def _escaped(given: str) -> str:
    """A name from outside on one line of markdown, shown as it is: it opens no tag, link, cell or code."""
    line = "".join(letter if letter.isprintable() else " " for letter in given)
    return re.sub(r"([\\`*\[\]<>|&~$])", r"\\\1", line)


def _ticks(given: str, least: int) -> str:
    """More backticks than stand together anywhere in `given`."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", given)), default=0))


def _code(given: str) -> str:
    line = "".join(letter if letter.isprintable() else " " for letter in given)
    ticks, space = _ticks(line, 1), " " * ("`" in line)
    return f"{ticks}{space}{line}{space}{ticks}"


def _fenced(given: str) -> str:
    return f"{_ticks(given, 3)}\n{given}\n{_ticks(given, 3)}"


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _fields(step: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in step.items() if value is not None)


def _traffic(report: dict[str, Any] | None) -> list[str]:
    """All-to-all traffic, once an evaluation has counted it."""
    if report is None or "traffic" not in report:  # evaluated by a trimoe that did not count it
        return []
    head = ("ranks", "bytes per token before", "after", "saving", "imbalance before (mean / worst layer)", "after")
    found = [(number, [seen["against"], seen["model"]]) for number, seen in report["traffic"]["ways"].items()]
    table = _table(head, [(number, *traffic_cells(models)) for number, models in found if any(models)])
    return [f"What all-to-all dispatch and combine would send under expert parallelism (hidden states in bf16, all MoE layers):\n\n{table}"]


def _quality(report: dict[str, Any] | None) -> str:
    if report is None:
        return "Not evaluated yet; `trimoe eval` on this folder adds the numbers here."
    rows = [
        (
            _escaped(row["name"]),
            f"{row['against']['perplexity']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['agreement']:.1%}",
        )
        for row in report["texts"]
    ]
    table = _table(("text", "perplexity before", "after", "KL, nats/token", "top-1 agreement"), rows)
    return f"{table}\n\nWindows of {report['length']} tokens, stride {report['stride']}. Perplexity flatters compressed models; look at the KL."
