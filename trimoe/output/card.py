"""The model card of a finished folder: what was removed, sizes on disk, numbers before and after, the exact command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimoe.checkpoint.atomic import write_text
from trimoe.checkpoint.side_files import CARD
from trimoe.errors import reading
from trimoe.methods import evidence
from trimoe.output.card_metadata import metadata
from trimoe.output.record import Record
from trimoe.show import form as forms
from trimoe.show.answer import Answer
from trimoe.show.format import GONE, runs, three
from trimoe.show.results import shown_tasks, traffic_cells
from trimoe.show.table import markdown

NATIVE = """Stock code does not know the form of this checkpoint. Load it with `import trimoe` and then `AutoModelForCausalLM.from_pretrained(folder)` (or
`trimoe.load(folder)`); without trimoe by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, which runs
`modeling_trimoe.py` of this folder. Otherwise transformers refuses it with a size mismatch."""
PACKED = """This is a compressed-tensors checkpoint: `AutoModelForCausalLM.from_pretrained(folder)`."""
BITS = """ Weights of its experts are packed integers of {bits} bits: with the compressed-tensors package (`pip install compressed-tensors`)
transformers unpacks them as it loads; `trimoe.load(folder)` runs them packed."""
TRIED = """ vLLM's loader reads such checkpoints; this one was not tried there."""
SQUEEZED = """ Zeros of pruned matrices are left out of its files and put back while it is loaded."""
SPEEDS = {"prefill_tokens_s": "prefill, tokens/s", "decode_tokens_s": "decode, tokens/s", "first_token_s": "first token, s"}
STOCK = "This is a stock checkpoint: `AutoModelForCausalLM.from_pretrained(folder)`."


def text(record: Record) -> str:
    """Return README.md."""
    plan, given, model, steps = record.plan, record.calibration, record.model, record.steps
    before, after = record.before, record.after
    sizes = [
        ("safetensors on disk (bytes)", "file_bytes"), ("parameters", "parameters"), ("parameters active per token", "active"),
        ("routed-expert parameters", "experts"),
    ]  # fmt: skip
    parts = [
        f"---\n{metadata(record)}\n---\n\n# {_escaped(Path(model).name or model)}, compressed",
        f"Made by trimoe {record.version} from {_code(model)}.",
        _loading(plan) + (SQUEEZED if any(step.fields.get("form") == "bitmask" for step in steps) else ""),
        "## What was done",
        "\n".join(f"- `{step.name}`: {_fields(step.fields)}" for step in steps),
        f"Calibration: {given['samples']} samples of {given['length']} tokens ({_escaped(', '.join(given['domains']))}), seed {record.seed}."
        if given["samples"]
        else f"Calibration: none, no step reads text; seed {record.seed}.",
        *_evidence(record.metrics),
        _layers(record.layers),
        "## Size",
        markdown(
            ("", "before", "after", "share"),
            [(name, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}") for name, key in sizes],
        ),
        *_traffic(record.evaluation),
        "## Quality on held-out text",
        _quality(record.evaluation),
        *_tasks(record.evaluation),
        *_speed(record.bench),
        f"## Command\n\n{_fenced(record.command)}\n",
        *(recovered(entry) for entry in record.recovered),
    ]
    return "\n\n".join(parts)


def _loading(plan: dict[str, Any]) -> str:
    """How the result is opened."""
    form = forms.form_of(plan)
    if forms.PACKED not in form:
        return NATIVE if form == forms.NATIVE else STOCK
    bits = " or ".join(str(number) for number in sorted({row["bits"] for row in plan["layers"] if row.get("bits")}))
    made_for = form == forms.PACKED and Answer.from_json(str((plan.get("loads_in") or {}).get("vllm"))).loads == "files"
    return (PACKED if form == forms.PACKED else NATIVE) + BITS.format(bits=bits) + (TRIED if made_for else "")


def _evidence(metrics: dict[str, Any]) -> list[str]:
    """On how much text each step was decided."""
    found = [row.get("measured_on") or {} for row in metrics.values() if isinstance(row, dict)]
    return [f"Decided by: {_escaped('; then by '.join(evidence.sentence(one) for one in found if one))}."] if any(found) else []


def _layers(rows: list[dict[str, Any]]) -> str:
    """What was done to every layer: the columns in which something was."""
    fewer = any(_left(row) != row["experts"] for row in rows)
    columns: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("layer", lambda row: row["layer"]), ("experts before" if fewer else "experts", lambda row: row["experts"]),
    ]  # fmt: skip
    if fewer:
        columns.append(("after", _left))
    used = {
        "rank": ("mean rank, first / last projection", str), "bits": ("bits of a weight", str),
        "sparsity": ("zeros", lambda share: share if isinstance(share, str) else f"{share:.0%}"),
    }  # fmt: skip
    for key, (title, shown) in used.items():
        if any(row.get(key) for row in rows):
            columns.append((title, lambda row, key=key, shown=shown: shown(row[key]) if row.get(key) else "-"))  # type: ignore[misc]
    return markdown(tuple(title for title, _ in columns), [tuple(cell(row) for _, cell in columns) for row in rows])


def _left(row: dict[str, Any]) -> Any:
    """How many experts of a layer, or what became of it."""
    return GONE.get(row.get("gone", ""), row["kept"])


def recovered(entry: dict[str, Any]) -> str:
    """For the model card: one recovery, and what held-out text said before and after."""
    metrics, data = entry["metrics"], entry["data"]
    rows = [(name.replace("_", " "), f"{metrics['before'][name]:.4g}", f"{metrics['after'][name]:.4g}") for name in metrics["before"]]
    text = f"{data['samples']} samples of {data['length']} tokens ({_escaped(', '.join(data['domains']))}), {data['held']} more held out"
    what = f"Trained by `{entry['method']}`" + (f" from {_code(entry['teacher'])}" if entry["teacher"] else "") + f" on {text}."
    if (kept := unimproved(metrics)) is not None:
        what += f" {kept}"
    return "## Recovered\n\n" + what + "\n\n" + markdown(("held-out text", "before", "after"), rows) + f"\n\n{_fenced(entry['command'])}\n"


def unimproved(metrics: dict[str, Any]) -> str | None:
    """A sentence on what training left as it was, since nothing that it tried was better on held-out text; None where all has changed."""
    if "layers" not in metrics:
        return "Nothing that training tried was better on held-out text, so the weights are as they were." if metrics["best"] == 0 else None
    if all(layer["before"] == 0 for layer in metrics["layers"].values()):
        return "Its experts give what the original's give already, so there was nothing to learn."
    same = [int(index) for index, layer in metrics["layers"].items() if not layer["after"] < layer["before"]]
    return f"Training made no better experts in layers {runs(same)}: they are as they were." if same else None


def files(record: Record) -> dict[str, str]:
    """Return the texts of a finished folder's record and card by their names, the record first."""
    return {record.path.name: record.text, CARD: text(record)}


def check(record: Record) -> None:
    """Raises UserError where a card cannot be made of what the record holds: found out before hours of measuring, not after."""
    with reading(record.path):
        text(record)


def refresh(record: Record) -> None:
    """Write README.md again. Raises UserError where the record is damaged."""
    with reading(record.path):
        shown = text(record)
    write_text(record.folder / CARD, shown)


def keep(record: Record) -> None:
    """Write what has come into the record to its folder, and the card that says so. Raises UserError where the record is damaged."""
    check(record)
    record.write()
    refresh(record)


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


def _fields(step: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in step.items() if value is not None)


def _traffic(report: dict[str, Any]) -> list[str]:
    """All-to-all traffic, once an evaluation has counted it."""
    if "traffic" not in report:  # evaluated by a trimoe that did not count it
        return []
    head = ("ranks", "bytes per token before", "after", "saving", "imbalance before (mean / worst layer)", "after")
    found = [(number, [seen["against"], seen["model"]]) for number, seen in report["traffic"]["ways"].items()]
    table = markdown(head, [(number, *traffic_cells(models)) for number, models in found if any(models)])
    return [f"What all-to-all dispatch and combine would send under expert parallelism (hidden states in bf16, all MoE layers):\n\n{table}"]


def _quality(report: dict[str, Any]) -> str:
    if not report or not report["texts"]:
        return "Not evaluated yet; `trimoe eval` on this folder adds the numbers here."
    sure = [(row.get("intervals") or {}).get("kl") for row in report["texts"]]
    rows = [
        (
            _escaped(row["name"]),
            f"{row['against']['perplexity']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}" + (f" ({kl[0]:.4f} to {kl[1]:.4f})" if kl else ""),
            f"{row['agreement']:.1%}",
        )
        for row, kl in zip(report["texts"], sure, strict=True)
    ]
    unit = "KL, nats/token" + (" (95 %)" if any(sure) else "")
    table = markdown(("text", "perplexity before", "after", unit, "top-1 agreement"), rows)
    dtype = report.get("dtype", "float32")
    rounded = f" Both models ran in {dtype}, whose roundings are in these numbers." if dtype != "float32" else ""
    return f"{table}\n\nWindows of {report['length']} tokens, stride {report['stride']}.{rounded} Perplexity flatters compressed models; look at the KL."


def _tasks(report: dict[str, Any]) -> list[str]:
    """lm-eval's tasks, original and compressed."""
    tasks = report.get("tasks") or []
    if not tasks:
        return []

    def cell(value: float | None, error: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

    rows = [
        (_escaped(row["task"]), _escaped(row["metric"]), f"{row['n']:,}",
         cell((row.get("against") or {}).get("value"), (row.get("against") or {}).get("stderr")),
         cell(row["value"], row.get("stderr")), cell(row.get("difference"), row.get("difference_stderr"), "+"))
        for row in shown_tasks(tasks)
    ]  # fmt: skip
    settings = report.get("task_settings") or {}
    cut = f" Of each task only the first {settings['limit']} documents: these are not the tasks' scores." if settings.get("limit") else ""
    version = f"lm-eval {settings['lm_eval']}, value ± standard error.{cut}" if settings.get("lm_eval") else cut
    return [
        "## Tasks",
        markdown(("task", "metric", "documents", "before", "after", "difference (paired)"), rows),
        *([version] if version else []),
    ]


def _speed(report: dict[str, Any]) -> list[str]:
    """What trimoe bench measured against the original."""
    ratio = report.get("ratio")
    if ratio is None:
        return []
    rows = [
        (label, *(three(model[name]["median"]) for model in reversed(report["models"])), f"{ratio[name]['median']:.2f}")
        for name, label in SPEEDS.items()
    ]
    how = (
        f"{report['batch']} x {report['prompt']} tokens, {report['generate']} new, {report['rounds']} rounds in turns; {report['machine']}."
    )
    return ["## Speed", markdown(("median", "before", "after", "ratio"), rows), _escaped(how)]
