"""A finished folder's record, as it lies in trimoe.json: whatever is in it comes from outside."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimoe.checkpoint.folder import ADAPTER
from trimoe.errors import UserError, first_line, reading
from trimoe.journal import FOLDER

NEEDED = ("trimoe", "model", "recipe", "plan", "decisions", "metrics", "calibration", "command", "seed", "versions")


@dataclass(frozen=True)
class Step:
    """One step of the recipe: its settings, and what was recorded of it (empty where nothing was)."""

    name: str
    fields: dict[str, Any]
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """`record` is trimoe.json; NaN in it reads as None."""

    folder: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Finished:
        """Raises UserError where no finished compression lies in `folder`."""
        folder = Path(folder)
        path = folder / "trimoe.json"
        if not path.is_file() or not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no finished trimoe folder{_why_not(folder)}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {first_line(error)}.") from None
        missing = [name for name in NEEDED if not isinstance(record, dict) or name not in record]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; it was not written by trimoe compress.")
        made = cls(folder, record)
        with reading(path):
            _ = made.steps, made.share, record.get("inputs", {}).get("model")  # what everything that is shown begins with
        return made

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        return str(self.record["model"])

    @property
    def steps(self) -> list[Step]:
        found = [next(iter(step.items())) for step in self.record["recipe"]["steps"]]
        metrics = self.record["metrics"]
        return [
            Step(name, fields, {**metrics.get(f"{number}.{name}", {}), **(metrics.get(name) or {})})
            for number, (name, fields) in enumerate(found)
        ]

    @property
    def before(self) -> dict[str, int]:
        return self.record["plan"]["before"]

    @property
    def after(self) -> dict[str, int]:
        return self.record["plan"]["after"]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The plan's rows: layer, experts (before), kept, rank, gone."""
        return self.record["plan"]["layers"]

    @property
    def decisions(self) -> dict[int, dict[str, Any]]:
        return {int(index): decision for index, decision in self.record["decisions"].items()}

    @property
    def evaluation(self) -> dict[str, Any]:
        return self.record.get("evaluation") or {}

    @property
    def texts(self) -> list[dict[str, Any]]:
        return self.evaluation.get("texts") or []

    @property
    def bench(self) -> dict[str, Any]:
        return self.record.get("bench") or {}

    @property
    def recovered(self) -> list[dict[str, Any]]:
        return self.record.get("recovered") or []

    @property
    def method(self) -> str:
        """What was done to it, in order."""
        return " + ".join([step.name for step in self.steps] + [f"recover ({entry['method']})" for entry in self.recovered])

    @property
    def commands(self) -> list[str]:
        """Those that made it, in order; a recipe's training has no command of its own."""
        return list(dict.fromkeys([str(self.record["command"]), *(str(entry["command"]) for entry in self.recovered)]))

    @property
    def asked(self) -> tuple[Any, ...]:
        """On what its mean KL was measured, in no order."""
        texts = sorted((str(row["name"]), str(row.get("windows")), int(row["tokens"])) for row in self.texts)
        return (*(self.evaluation.get(name) for name in ("length", "stride")), self.evaluation.get("dtype", "float32"), *texts)

    @property
    def share(self) -> float:
        """The result's safetensors bytes over the original's."""
        return self.after["file_bytes"] / self.before["file_bytes"]

    @property
    def kl(self) -> float | None:
        """Mean over the texts, nats/token; None where it was not evaluated against the original."""
        return self.evaluation.get("mean_kl")


def interval(row: dict[str, Any], name: str) -> tuple[float | None, float | None]:
    """The 95 % interval of a text's number, where the evaluation has one."""
    low, high = (row.get("intervals") or {}).get(name) or (None, None)
    return low, high


def layer_rows(step: Step) -> dict[int, dict[str, Any]]:
    """What a step recorded of each layer."""
    return {int(index): row for index, row in (step.metrics.get("layers") or {}).items()}


def _why_not(folder: Path) -> str:
    """What else it is, as the end of a sentence."""
    if (folder / "sweep.json").is_file():
        return f" but a sweep's: {folder / 'sweep.html'} compares its variants, and those whose weights were kept are folders in it."
    if (folder / ADAPTER).is_file():
        return " but an adapter's: report on the folder that it was trained for."
    return ": a run in it was not finished; start it again." if (folder / FOLDER).is_dir() else "."
