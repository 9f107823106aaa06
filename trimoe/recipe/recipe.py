"""YAML to frozen dataclasses. The recipe is what is written: it is never rewritten, and unknown keys are errors that list the known."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import InstanceOf, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trimoe.errors import UserError, first_line
from trimoe.methods import METHODS
from trimoe.methods.method import Method, plain
from trimoe.recipe.recover import Recover
from trimoe.show.format import counted, listed
from trimoe.text.spec import STRICT, CalibrationSpec

BUILTIN = Path(__file__).parents[1] / "recipes"
LARGEST = 1 << 16  # bytes of a recipe; a long one has two thousand


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """What to do, in order, on which calibration text, what must be able to load the result, and how it is trained afterwards.

    steps        the methods in the order in which they run, at least one, each `name: {its fields}`
    calibration  the text on which decisions are made
    target       what must load the result; refused at plan time if it cannot. `any`: every engine that knows the family
    recover      training afterwards; none unless it is given
    """

    steps: tuple[InstanceOf[Method], ...]
    calibration: CalibrationSpec = dataclasses.field(default_factory=CalibrationSpec)
    target: Literal["transformers", "vllm", "llama.cpp", "any"] = "transformers"
    recover: Recover | None = None

    @property
    def reads_text(self) -> bool:
        """Whether any step depends on calibration text."""
        return any(step.reads_text for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """In the form of the YAML file, every field spelled out."""
        steps = [{step.name: step.to_json()} for step in self.steps]
        body = {"steps": steps, "calibration": plain(self.calibration), "target": self.target}
        return body if self.recover is None else {**body, "recover": self.recover.to_json()}


def names() -> list[str]:
    return sorted(path.stem for path in BUILTIN.glob("*.yaml"))


def text_of(name: str) -> str:
    """A built-in recipe as YAML, ready to edit."""
    path = BUILTIN / f"{name}.yaml"
    if name not in names():
        close = difflib.get_close_matches(name, names(), 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"There is no built-in recipe {name!r}{hint} and no such file; there are: {', '.join(names())}.")
    return path.read_text(encoding="utf-8")


def load(recipe: str | Path | dict[str, Any] | Recipe, changes: str | Sequence[str] = ()) -> Recipe:
    """A built-in name, a YAML file, or a mapping; `changes` are "path.to.field=value" overrides."""
    if isinstance(recipe, Recipe) and not changes:
        return recipe
    return parse(*read(recipe, changes))


def read(recipe: str | Path | dict[str, Any] | Recipe, changes: str | Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The mapping that a recipe is, changed but not checked yet, and where it came from."""
    if isinstance(recipe, Recipe):
        recipe = recipe.to_json()
    if isinstance(recipe, dict):
        raw: Any = recipe
        where = "the recipe"
    elif isinstance(recipe, str | os.PathLike):
        where = f"recipe {recipe}"
        raw = _yaml(_source(Path(recipe), where), where)
    else:
        raise UserError(f"The recipe is {recipe!r}; a built-in name, a YAML file or a mapping is expected.")
    if not isinstance(raw, dict):
        raise UserError(f"{where} {'is empty' if raw is None else f'holds {_kind(raw)}'}; a mapping with steps is expected.")
    changes = listed(changes)
    _refuse_repeated(changes)
    for change in changes:
        raw = _changed(raw, change)
    return raw, where


def _refuse_repeated(changes: Sequence[str]) -> None:
    keys = [change.partition("=")[0].strip() for change in changes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UserError(f"--set gives {twice} twice; leave one of them out.")


def _source(path: Path, where: str) -> str:
    """The text of a built-in recipe, else of a file, which may be a pipe."""
    if str(path) in names() or not path.exists():
        return text_of(str(path))
    if path.is_dir():
        raise UserError(f"{where} is a folder; a YAML file is expected.")
    try:
        with open(path, "rb") as file:
            source = file.read(LARGEST + 1)
        if len(source) > LARGEST:
            raise UserError(f"{where} has more than {LARGEST:,} bytes, the most that are read.")
        return source.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}).") from None


def with_calibration(recipe: Recipe, sources: str | Sequence[str], samples: int | None, length: int | None) -> Recipe:
    """The recipe with other text, or another amount of it."""
    changes = {"data": listed(sources) or None, "samples": samples, "length": length}
    body = recipe.to_json()
    body["calibration"] |= {key: value for key, value in changes.items() if value is not None}
    return load(body)


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for gigabytes. And without keys given twice, of which YAML's readers drop one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, written *name; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name, line = (key.value if isinstance(key, yaml.ScalarNode) else None), key.start_mark.line + 1
            if name == "<<":
                raise yaml.YAMLError(f"line {line} merges with <<; write the values out")
            if name in seen:
                raise yaml.YAMLError(f"line {line} gives the key {name!r} again, which stands in the same mapping already")
            seen |= {name} if name is not None else set()
        return super().construct_mapping(node, deep)


def _yaml(source: str, where: str) -> Any:
    try:
        return yaml.load(source, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{where} is not valid YAML ({first_line(error)}).") from None


def _kind(value: Any) -> str:
    """What a YAML value is, in words."""
    return "a list" if isinstance(value, list) else f"{value!r} alone" if len(repr(value)) <= 40 else "text alone"


def _changed(raw: dict[str, Any], change: str) -> dict[str, Any]:
    path, equals, value = change.partition("=")
    if not equals:
        raise UserError(f"--set {change!r} has no '='; write for example --set steps.0.ratio=0.5.")
    raw = yaml.safe_load(yaml.safe_dump(raw))
    at: Any = raw
    parts = path.split(".")
    for depth, part in enumerate(parts):
        # steps.0.ratio means steps.0.<the step's only key>.ratio
        places = depth >= 2 and parts[0] == "steps" and all(number.isdigit() for number in parts[1:depth])
        if isinstance(at, dict) and places and len(at) == 1 and part not in at:
            name = next(iter(at))
            at[name] = {} if at[name] is None else at[name]
            at = at[name]
        last = depth == len(parts) - 1
        if isinstance(at, list):
            if not part.isdigit() or int(part) >= len(at):
                held = counted(len(at), "entry", "entries")
                raise UserError(f"--set {change!r}: {'.'.join(parts[:depth])} has {held}, numbered from 0; {part!r} is none of them.")
            if last:
                at[int(part)] = _yaml(value, f"--set {change!r}")
            else:
                at = at[int(part)]
        elif isinstance(at, dict):
            if last:
                at[part] = _yaml(value, f"--set {change!r}")
            else:
                if isinstance(at.get(part), str):
                    at[part] = {at[part]: {}}  # a choice given by its name gets fields
                at = at.setdefault(part, {})
        else:
            raise UserError(f"--set {change!r}: {'.'.join(parts[:depth])} is a plain value and has no field {part!r}.")
    return raw


def parse(raw: dict[str, Any], where: str) -> Recipe:
    """The recipe that a mapping says; `where` is for messages."""
    steps = raw.get("steps")
    if not isinstance(steps, list) or not steps:
        raise UserError(f"{where}: steps must be a list of at least one of: {', '.join(METHODS)}.")
    parsed = []
    for number, step in enumerate(steps):
        if isinstance(step, str):
            step = {step: {}}
        if not isinstance(step, dict) or len(step) != 1 or next(iter(step)) not in METHODS:
            if isinstance(step, dict) and len(step) > 1:
                raise UserError(f"{where}: steps.{number} has {len(step)} keys ({', '.join(map(str, step))}); a step has one, its method.")
            given = next(iter(step), "nothing") if isinstance(step, dict) else step
            raise UserError(f"{where}: steps.{number} is {given!r}; a step is one of: {', '.join(METHODS)}.")
        name, body = next(iter(step.items()))
        parsed.append(_validated(METHODS[name], body if body is not None else {}, f"{where}: steps.{number}.{name}"))
    rest = {key: value for key, value in raw.items() if key != "steps"}
    calibration = _validated(CalibrationSpec, rest.pop("calibration", None) or {}, f"{where}: calibration")
    training = rest.pop("recover", None)
    if training is not None:
        rest["recover"] = _validated(Recover, training, f"{where}: recover")
    return _validated(Recipe, {**rest, "steps": tuple(parsed), "calibration": calibration}, where)


def recovery(body: dict[str, Any], changes: Sequence[str] = ()) -> Recover:
    """The `recover` section alone; `changes` are "field=value" overrides of what `body` leaves open."""
    _refuse_repeated(changes)
    for change in changes:
        if (key := change.partition("=")[0].strip()) in body:
            raise UserError(f"--set {change} and the option for {key} say two things; leave one of them out.")
    for change in changes:
        body = _changed(body, change)
    return _validated(Recover, body, "recover")


def _validated(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; a mapping is expected.")
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [entry.name for entry in fields(kind)]
            key = path.rpartition(".")[2]
            close = difflib.get_close_matches(key, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{where} has no field {path!r}{hint}; known: {', '.join(known)}.") from None
        if first["type"] == "missing":
            raise UserError(f"{where} needs the field {path!r}.") from None
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        given = f"{path} is {first['input']!r}; " if path else ""
        if isinstance(first["input"], list):
            message += " (several values are for trimoe sweep)"
        raise UserError(f"{where}: {given}{message[0].lower()}{message[1:]}.") from None
