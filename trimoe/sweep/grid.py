"""A recipe whose fields are lists: one recipe for every combination, each with a name that says what is its own.

A list in place of a value means these values, one after the other. A list in place of a step means one of these steps, of which each may
be a list of steps in a row, or `none`. Only `data`, a list of texts by itself, wants a list of lists.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimoe.errors import UserError
from trimoe.recipe import recipe as recipes
from trimoe.recipe.recipe import Recipe

MOST = 500  # variants of one sweep
LONGEST = 80  # characters of a variant's name
Path = tuple[str, ...]  # ("steps", "0", "expert_drop", "ratio")
Choices = dict[Path, str]  # what was chosen, in a few characters


@dataclass(frozen=True)
class Variant:
    """One combination. `varied`: the fields that differ between variants, by the shortest name that is unambiguous."""

    name: str
    varied: dict[str, str]
    raw: dict[str, Any]
    where: str

    def recipe(self) -> Recipe:
        """Raises UserError where the combination is no recipe."""
        return recipes.parse(self.raw, self.where)


def variants(given: Sequence[Any] | Mapping[str, Any], changes: Sequence[str] = ()) -> list[Variant]:
    """All combinations of one or several recipes (names, files, mappings; by names of their own in a mapping), every one once."""
    found: list[tuple[str, Choices, dict[str, Any], str]] = []
    named = given if isinstance(given, Mapping) else {_recipe_label(recipe, place): recipe for place, recipe in enumerate(given)}
    if len(named) != len(given):
        raise UserError("A recipe is given twice, or two recipes of one name; give each once.")
    for label, recipe in named.items():
        raw, where = recipes.read(recipe, changes)
        found += [(label, choices, one, where) for choices, one in _every(raw, (), where)]
        if len(found) > MOST:
            raise UserError(f"{where}: the lists make more than {MOST} combinations; leave values out.")
    short = _short([set(choices) for _, choices, _, _ in found])
    whole: dict[str, Variant] = {}
    for label, choices, raw, where in found:
        varied = {short[path]: value for path, value in choices.items()}
        if len(given) > 1:
            varied = {"recipe": label, **varied}
        words = [
            value if key.startswith(("step ", "recipe")) else f"{key}-{value}"
            for key, value in varied.items()
            if not (key.startswith("step ") and value == "none")
        ]
        whole.setdefault(json.dumps(raw, sort_keys=True, default=str), Variant("_".join(words) or label, varied, raw, where))
    return _named(list(whole.values()))


def _recipe_label(recipe: Any, place: int) -> str:
    return re.split(r"[/\\]", recipe)[-1].removesuffix(".yaml").removesuffix(".yml") if isinstance(recipe, str) else f"recipe-{place}"


def _named(found: list[Variant]) -> list[Variant]:
    """Names as those of folders: plain letters, and no two alike."""
    clean = [re.sub(r"[^A-Za-z0-9._+-]+", "-", variant.name).strip("-.") for variant in found]
    often = Counter(name.lower() for name in clean)
    out = []
    for name, variant in zip(clean, found, strict=True):
        if not name or len(name) > LONGEST or often[name.lower()] > 1:
            digest = hashlib.sha256(json.dumps(variant.raw, sort_keys=True, default=str).encode()).hexdigest()[:8]
            name = f"{name[: LONGEST - 9].rstrip('-.')}-{digest}".lstrip("-")
        out.append(Variant(name, variant.varied, variant.raw, f"{variant.where}, variant {name}" if len(found) > 1 else variant.where))
    return out


def _every(value: Any, path: Path, where: str) -> list[tuple[Choices, Any]]:
    """Each alternative of `value` with what was chosen for it."""
    if isinstance(value, dict):
        return _product([(key, _every(item, (*path, str(key)), where)) for key, item in value.items()], where)
    if path == ("steps",) and isinstance(value, list):
        rows = _product([(str(place), _step(item, (*path, str(place)), where)) for place, item in enumerate(value)], where)
        whole = [(choices, [step for steps in row.values() for step in steps]) for choices, row in rows]
        return [(choices, steps) for choices, steps in whole if steps] or whole[:1]  # all left out is the original, not a variant of it
    if path[-1:] == ("data",):
        nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
        return [({path: _texts(item)}, item) for item in value] if nested else [({}, value)]
    if isinstance(value, list):
        found = [(_label(item), item) for item in _some(value, path, where)]
        return [({path: label, **choices}, one) for label, item in found for choices, one in _every(item, path, where)]
    return [({}, value)]


def _step(value: Any, path: Path, where: str) -> list[tuple[Choices, list[Any]]]:
    """The alternatives at one place among the steps, each a list of steps in a row."""
    if not isinstance(value, list):
        return [(choices, [one]) for choices, one in _every(value, path, where)]
    rows: list[tuple[Choices, list[Any]]] = []
    labels = [_steps_label(item) for item in _some(value, path, where)]
    for item, label in zip(value, labels, strict=True):
        label = label if labels.count(label) == 1 else _label(item)
        if item in (None, "none"):
            rows.append(({path: "none"}, []))
            continue
        inner = item if isinstance(item, list) else [item]
        combined = _product([(str(i), _every(step, (*path, str(i)), where)) for i, step in enumerate(inner)], where)
        rows += [({path: label, **choices}, list(row.values())) for choices, row in combined]
    return rows


def _product(parts: Sequence[tuple[str, list[tuple[Choices, Any]]]], where: str) -> list[tuple[Choices, dict[str, Any]]]:
    rows: list[tuple[Choices, dict[str, Any]]] = [({}, {})]
    for key, options in parts:
        if len(rows) * len(options) > MOST:
            raise UserError(f"{where}: the lists make more than {MOST} combinations; leave values out.")
        rows = [({**chosen, **choices}, {**row, key: one}) for chosen, row in rows for choices, one in options]
    return rows


def _some(value: list[Any], path: Path, where: str) -> list[Any]:
    if not value:
        raise UserError(f"{where}: {'.'.join(path)} is an empty list; a list stands for its values, one after the other.")
    return value


def _steps_label(item: Any) -> str:
    if isinstance(item, list):
        return "+".join(_steps_label(step) for step in item)
    return str(next(iter(item), "nothing")) if isinstance(item, dict) else str(item)


def _label(value: Any) -> str:
    """A value in a few characters: 0.25, none, genetic-generations-50. Lists inside it make choices of their own."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        fields = {key: "" if item in ({}, None) else _label(item) for key, item in value.items() if not isinstance(item, list)}
        return "-".join(f"{key}-{label}" if label else str(key) for key, label in fields.items())
    if isinstance(value, list):
        return "+".join(_label(item) for item in value)
    return str(value)


def _texts(value: Any) -> str:
    return "+".join(re.split(r"[/\\]", str(text))[-1] for text in (value if isinstance(value, list) else [value]))


def _short(together: Sequence[set[Path]]) -> dict[Path, str]:
    """For each varied field the least of its path that no other varied field of the same recipe has: `ratio`, `expert_drop.ratio`, ..."""
    out: dict[Path, str] = {}
    for path in set().union(*together):
        beside = set().union(*(paths for paths in together if path in paths)) - {path}
        if path[0] == "steps" and path[-1].isdigit():
            out[path] = f"step {'.'.join(path[1:])}"
            continue
        out[path] = next(
            (".".join(path[-length:]) for length in range(1, len(path)) if all(other[-length:] != path[-length:] for other in beside)),
            ".".join(path),
        )
    return out
