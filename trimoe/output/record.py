"""The record of a finished folder: what it was made from, what was decided, what was measured since. It lies in trimoe.json, which this
module alone reads and writes; whatever is in it comes from outside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from trimoe.checkpoint.atomic import write_text
from trimoe.checkpoint.folder import ADAPTER, Checkpoint
from trimoe.checkpoint.headers import read_json
from trimoe.checkpoint.side_files import RECORD
from trimoe.errors import UserError, first_line, reading
from trimoe.journal import FOLDER
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.skeleton import Skeleton
from trimoe.text.samples import Calibration
from trimoe.version import VERSION, versions

SHOWN = ("trimoe", "model", "recipe", "plan", "decisions", "metrics", "calibration", "command", "seed", "versions")  # on a page
TRAINED_FROM = {"model", "recipe", "decisions", "inputs"}  # without which nothing can be trained
MEASURED = ("texts", "tasks", "generation", "traffic")  # what an evaluation may measure
OF_TEXTS = ("texts", "length", "stride", "dtype")


@dataclass(frozen=True)
class Step:
    """One step of the recipe: its settings, and what was recorded of it (empty where nothing was)."""

    name: str
    fields: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def layers(self) -> dict[int, dict[str, Any]]:
        """What the step recorded of each layer."""
        return {int(index): row for index, row in (self.metrics.get("layers") or {}).items()}


def _key(name: str, absent: Any = None) -> property:
    """Return a property that is what lies under a key; one with a value for `absent` may lack its key, or have null there."""
    return property(lambda record: record.body[name] if absent is None else record.body.get(name) or absent)


@dataclass(frozen=True)
class Record:
    """`body` holds trimoe.json with its keys in the order in which they lie there. What reads a property of a damaged record raises an
    exception of Python, which `errors.reading(record.path)` makes a sentence."""

    folder: Path
    body: dict[str, Any]

    # ---- from a run, and from folders

    @classmethod
    def of(
        cls, out: Path, skeleton: Skeleton, text: Calibration, *, recipe: dict[str, Any], plan: dict[str, Any], decisions: Decisions,
        metrics: dict[str, Any], parts: dict[str, Any], source_card: dict[str, Any], command: str, seed: int, inputs: dict[str, Any],
    ) -> Record:  # fmt: skip
        """Return the record of a new result. Each argument is a key of the file."""
        drawn = {
            "samples": len(text.samples_NL), "length": text.samples_NL.shape[1], "domains": sorted(set(text.domains)),
            "domain_samples": text.counts,
        }  # fmt: skip
        return cls(out, {
            "trimoe": VERSION, "model": _lasting(skeleton), "recipe": recipe, "plan": plan,
            "decisions": {str(index): decision.to_json() for index, decision in decisions.items()}, "metrics": metrics,
            "parts": parts, "earlier": Record.recipes_of(skeleton.checkpoint.folder), "source_card": source_card,
            "calibration": drawn, "command": command, "seed": seed, "versions": versions(), "inputs": inputs,
        })  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises UserError where there is none, or no JSON object."""
        return cls(folder, read_json(folder / RECORD))

    @classmethod
    def found(cls, folder: Path) -> Record | None:
        """Return the same, or None where there is none."""
        return cls.read(folder) if (folder / RECORD).is_file() else None

    @classmethod
    def beside(cls, folder: Path) -> Record | None:
        """Return the record of any model's folder, or None of one that trimoe did not make. Raises UserError where it names no model."""
        if not (folder / RECORD).is_file():
            return None
        with reading(folder / RECORD):
            made = cls(folder, json.loads((folder / RECORD).read_text(encoding="utf-8")))
            _ = made.model
        return made

    @classmethod
    def finished(cls, folder: Path) -> Record:
        """Return a record that can be shown, in which NaN reads as None. Raises UserError where no finished compression lies in `folder`."""
        path = folder / RECORD
        if not path.is_file() or not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no finished trimoe folder{_why_not(folder)}")
        try:
            body = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {first_line(error)}.") from None
        missing = [name for name in SHOWN if not isinstance(body, dict) or name not in body]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)}; it was not written by trimoe compress.")
        made = cls(folder, body)
        with reading(path):
            _ = made.steps, made.share, body.get("inputs", {}).get("model")  # what everything that is shown begins with
        return made

    @classmethod
    def to_train(cls, folder: Path) -> Record:
        """Raises UserError where `folder` is not finished, or its record does not say what training must know."""
        if not folder.is_dir():
            raise UserError(f"There is no folder {str(folder)!r}; recovery trains a finished folder of trimoe.")
        if (folder / FOLDER).exists() or not (folder / "config.json").is_file() or (made := cls.found(folder)) is None:
            raise UserError(f"{folder} is not a finished folder of trimoe (which has config.json and trimoe.json); finish its run first.")
        if not set(made.body) >= TRAINED_FROM or not isinstance(made.body["recipe"], dict):
            raise UserError(f"{made.path} is not what trimoe writes; the folder is damaged.")
        return made

    @staticmethod
    def recipes_of(folder: Path) -> list[Any]:
        """Return the recipes that made `folder`, first to last; none where trimoe did not make it, or its record says nothing usable."""
        try:
            return Record.read(folder).recipes
        except (OSError, ValueError, KeyError, TypeError):
            return []

    # ---- what it says

    recipe = _key("recipe")
    plan = _key("plan")  # JSON of the plan that the result was written by
    metrics = _key("metrics")  # what every step decided and what it cost
    calibration = _key("calibration")  # how much text of which domains was drawn
    seed, versions = _key("seed"), _key("versions")
    inputs = _key("inputs", {})  # what the result depends on: recipe, seed, dtype, version, fingerprints of model and text
    parts = _key("parts", {})  # bytes by layer and part of the model
    source_card = _key("source_card", {})  # what the card takes over from the original's
    evaluation, bench = _key("evaluation", {}), _key("bench", {})
    recovered = _key("recovered", [])  # what trimoe recover did to the folder since, first to last

    @property
    def path(self) -> Path:
        return self.folder / RECORD

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def version(self) -> str:
        return str(self.body["trimoe"])

    @property
    def model(self) -> str:
        """The name of the model that the folder was made from."""
        return str(self.body["model"])

    @property
    def recipes(self) -> list[Any]:
        """Its own recipe, after those that made the model that it was made from."""
        return [*self.body.get("earlier", []), self.recipe]

    @property
    def calibration_data(self) -> Any:
        """The text sources that the recipe names, if it does."""
        return self.recipe.get("calibration", {}).get("data")

    @property
    def steps(self) -> list[Step]:
        found = [next(iter(step.items())) for step in self.recipe["steps"]]
        return [
            Step(name, fields, {**self.metrics.get(f"{number}.{name}", {}), **(self.metrics.get(name) or {})})
            for number, (name, fields) in enumerate(found)
        ]

    @cached_property
    def decisions(self) -> Decisions:
        return {int(index): LayerDecision.from_json(value) for index, value in self.body["decisions"].items()}

    @property
    def before(self) -> dict[str, int]:
        return self.plan["before"]

    @property
    def after(self) -> dict[str, int]:
        return self.plan["after"]

    @property
    def layers(self) -> list[dict[str, Any]]:
        """The plan's rows: layer, experts (before), kept, rank, gone."""
        return self.plan["layers"]

    @property
    def share(self) -> float:
        """The result's safetensors bytes over the original's."""
        return self.after["file_bytes"] / self.before["file_bytes"]

    @property
    def method(self) -> str:
        """What was done to it, in order."""
        return " + ".join([step.name for step in self.steps] + [f"recover ({entry['method']})" for entry in self.recovered])

    @property
    def command(self) -> str:
        return str(self.body["command"])

    @property
    def commands(self) -> list[str]:
        """Those that made it, in order; a recipe's training has no command of its own."""
        return list(dict.fromkeys([self.command, *(str(entry["command"]) for entry in self.recovered)]))

    @property
    def texts(self) -> list[dict[str, Any]]:
        return self.evaluation.get("texts") or []

    @property
    def kl(self) -> float | None:
        """Mean over the texts, nats/token; None where it was not evaluated against the original."""
        return self.evaluation.get("mean_kl")

    @property
    def asked(self) -> tuple[Any, ...]:
        """On what its mean KL was measured, in no order."""
        texts = sorted((str(row["name"]), str(row.get("windows")), int(row["tokens"])) for row in self.texts)
        return (*(self.evaluation.get(name) for name in ("length", "stride")), self.evaluation.get("dtype", "float32"), *texts)

    # ---- what it is of

    def is_result_of(self, inputs: dict[str, Any], trained: Sequence[dict[str, Any]] = ()) -> bool:
        """Return whether it was made from these inputs and trained by these specifications since. Raises UserError where it is damaged."""
        with reading(self.path):
            return self.body["inputs"] == _as_read(inputs) and [entry["spec"] for entry in self.recovered] == [*trained]

    def other_inputs(self, inputs: dict[str, Any]) -> list[str]:
        """Return the names of the inputs that it was not made from. Raises UserError where it is damaged."""
        with reading(self.path):
            held = self.body["inputs"]
            return [name for name, value in _as_read(inputs).items() if held.get(name) != value]

    def made_from(self, model: str | None) -> bool:
        """Return whether `model` names the model that the folder was made from."""
        return model is not None and (model == self.model or Path(model).resolve() == Path(self.model))

    def origin(self) -> str:
        """Return the model that the folder was made from. Raises UserError where it is no longer to be had or not the same any more."""
        with reading(self.path):
            name, fingerprint = self.model, self.body["inputs"]["model"]
        source = Checkpoint.open(name)
        if source.fingerprint != fingerprint:
            raise UserError(f"{source.name} has changed since {self.folder} was made from it.")
        return source.name

    # ---- with more in it, and back to the folder

    def with_command(self, recipe: dict[str, Any], command: str) -> Record:
        return replace(self, body={**self.body, "recipe": recipe, "command": command})

    def with_evaluation(self, report: dict[str, Any], command: str | None = None) -> Record:
        """Return it with the numbers of an evaluation against the original. What that did not measure (texts, tasks) stays as an earlier
        one left it; `commands` says by which command line each was measured."""
        old = self.evaluation
        new = {name: value for name, value in report.items() if report["texts"] or name not in OF_TEXTS}
        measured = [name for name in MEASURED if report.get(name)]
        commands = {name: said for name, said in (old.get("commands") or {}).items() if name not in measured}
        commands |= {} if command is None else dict.fromkeys(measured, command)
        first = {name: report[name] for name in OF_TEXTS if name in report}
        last = {"commands": commands} if "commands" in old or commands else {}
        return replace(self, body={**self.body, "evaluation": {**first, **old, **new, **last}})

    def with_bench(self, report: dict[str, Any], command: str) -> Record:
        """Return it with speed and memory, measured in turns with the original."""
        return replace(self, body={**self.body, "bench": {**report, "command": command}})

    def with_recovery(self, entry: dict[str, Any]) -> Record:
        """Return it as training leaves it: what was measured before was of other numbers."""
        body = {name: value for name, value in self.body.items() if name not in ("evaluation", "bench")}
        return replace(self, body={**body, "recovered": [*self.recovered, entry]})

    @property
    def text(self) -> str:
        return json.dumps(self.body, indent=1) + "\n"

    def write(self) -> None:
        write_text(self.path, self.text)


def _as_read(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs as they come out of a file."""
    return json.loads(json.dumps(inputs))


def _lasting(skeleton: Skeleton) -> str:
    """Return the model's name as it can be opened from any folder: a hub id, builtin:NAME, or an absolute path."""
    name = skeleton.name
    return str(skeleton.checkpoint.folder.resolve()) if Path(name).expanduser().is_dir() else name


def _why_not(folder: Path) -> str:
    """Return what else the folder is, as the end of a sentence."""
    if (folder / "sweep.json").is_file():
        return f" but a sweep's: {folder / 'sweep.html'} compares its variants, and those whose weights were kept are folders in it."
    if (folder / ADAPTER).is_file():
        return " but an adapter's: report on the folder that it was trained for."
    return ": a run in it was not finished; start it again." if (folder / FOLDER).is_dir() else "."
