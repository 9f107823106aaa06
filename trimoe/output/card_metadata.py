"""What the hub reads at the head of a model card: base model, licence, languages, tags, results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from trimoe.checkpoint.side_files import CARD
from trimoe.output.record import Record
from trimoe.show.results import shown_tasks

FRONT_MATTER = 1 << 16  # characters of a source's README.md in which its metadata must lie
NULL = ("", "~", "null", "Null", "NULL")  # how YAML writes that there is nothing
INHERITED = ("license", "license_name", "license_link", "language")


def inherited(folder: Path) -> dict[str, Any]:
    """What a compressed model takes over of its source's card: licence and languages, as the front matter of its README.md says them."""
    path = folder / CARD
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        first, *lines = file.read(FRONT_MATTER).splitlines() or [""]
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if first.rstrip() != "---" or not ends:
        return {}
    try:
        given = yaml.load("\n".join(lines[: ends[0]]), Loader=yaml.BaseLoader)  # words alone: nothing is made of tags, dates, merges
    except (yaml.YAMLError, ValueError, RecursionError):  # a date that is none, a thousand brackets
        return {}
    found = {name: _said(given.get(name)) for name in INHERITED} if isinstance(given, dict) else {}
    return {name: value for name, value in found.items() if value}


def _said(value: Any) -> Any:
    """A name, or those of a list of names that are not null; None for everything else."""
    if isinstance(value, list):
        return [name for name in value if name not in NULL] if all(isinstance(name, str) for name in value) else None
    return value if isinstance(value, str) and value not in NULL else None


def metadata(record: Record) -> str:
    """What the hub reads of a card, as YAML."""
    model, steps = record.model, [step.name for step in record.steps]
    of_hub = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not Path(model).exists()
    # the hub knows adapter, finetune, merge and quantized; what is pruned counts as the second
    fields: dict[str, Any] = (
        {"base_model": model, "base_model_relation": "quantized" if "quantize" in steps else "finetune"} if of_hub else {}
    )
    fields |= record.source_card
    results = _results(record.evaluation)
    if results:
        fields |= {"model_name": f"{Path(model).name or model}, compressed", "eval_results": results}
    tags = list(dict.fromkeys(["trimoe", "mixture-of-experts", *steps]))
    data = ModelCardData(**fields, library_name="transformers", pipeline_tag="text-generation", tags=tags)
    return data.to_yaml().strip()


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """The model-index: perplexity, and KL and agreement where there was an original, of every text; metrics of tasks that were run whole."""

    def one(dataset: str, metric: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="text-generation", dataset_type=re.sub(r"[^\w./-]+", "-", dataset), dataset_name=dataset, metric_type=metric,
            metric_name=name, metric_value=round(value, 6),
        )  # fmt: skip

    found = []
    for row in report.get("texts", ()):
        found.append(one(row["name"], "perplexity", "Perplexity", row["perplexity"]))
        if "kl" in row:
            found.append(one(row["name"], "kl", "KL to the original, nats/token", row["kl"]))
            found.append(one(row["name"], "agreement", "Top-1 agreement with the original", row["agreement"]))
    if (report.get("task_settings") or {}).get("limit") is not None:
        return found  # a part of a task is not what others call its score
    return found + [one(row["task"], row["metric"], row["metric"], row["value"]) for row in shown_tasks(report.get("tasks") or ())]
