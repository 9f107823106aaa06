"""A recipe worked through on paper: stand-in decisions of the right sizes, and what is still open. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from trimoe.calibration.search_tokens import search_budget, search_tensors
from trimoe.errors import UserError
from trimoe.methods.method import Method, Open
from trimoe.model.decision import Decisions, LayerDecision, decided_sites, unchanged
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.recipe.recipe import Recipe


class Outline:
    """A recipe's steps on paper: stand-in decisions of the right sizes, every user error that can be found without a weight, and what is
    still open. Where it is open which layers are dropped, those of the fewest bytes are (or the most, for `largest`)."""

    def __init__(self, skeleton: Skeleton, recipe: Recipe, *, largest: bool):
        self.skeleton, self.largest = skeleton, largest
        self.decisions: Decisions = unchanged(skeleton.sites)
        self.slack, self.open = 0, frozenset[Open]()
        self.gone = {"block": (0, 0), "moe": (0, 0)}  # decoder layers and MoE sub-layers that go: at least, at most
        last: str | None = None
        for number, step in enumerate(recipe.steps):
            if last is not None:
                raise UserError(f"{last} is fitted to the finished model, so it comes last and once; here {step.name} follows it.")
            try:
                step.shape(self.sites, self.decisions)
                searched(step, self.sites, recipe, 0)
            except UserError as mistake:  # says the method; which of the steps it is, is known here
                said = str(mistake)
                raise UserError(f"steps.{number}.{said}" if said.startswith(f"{step.name}:") else said) from None
            made = step.outline(self)
            self.decisions = {**self.decisions, **made.decisions}
            self.slack, self.open = self.slack + made.slack, self.open | made.open
            for kind, (low, high) in made.gone.items():
                self.gone[kind] = (self.gone[kind][0] + low, self.gone[kind][1] + high)
            self.__dict__.pop("layout", None)
            last = step.name if any(decision.changed for decision in self.decisions.values()) else None

    @property
    def sites(self) -> dict[int, MoeBlock]:
        return decided_sites(self.skeleton.sites, self.decisions)

    @cached_property
    def layout(self) -> Layout:
        """Of the decisions so far."""
        return Layout(self.skeleton, self.decisions)

    @property
    def open_bytes(self) -> bool:
        return bool(self.open - {"layers"})

    def layer_bytes(self, index: int, decision: LayerDecision | None = None) -> int:
        if decision is None:
            return self.layout.groups[index + 1].nbytes
        return Layout(self.skeleton, {**self.decisions, index: decision}, only=index).groups[index + 1].nbytes

    def alike(self, blocks: Iterable[int], layers: Iterable[int]) -> bool:
        """Those that can go are all alike, one after the other."""
        places = {index: place for place, index in enumerate(layers)}
        place = [places[index] for index in blocks]
        forms = {
            tuple((_unnumbered(entry.key), entry.dtype, entry.shape, entry.stands_for) for entry in self.layout.groups[index + 1])
            for index in blocks
        }
        return len(forms) == 1 and place == list(range(place[0], place[0] + len(place)))


def _unnumbered(key: str) -> str:
    """Without the layer's number, the first in it (as Layout renumbers)."""
    words = key.split(".")
    at = next((place for place, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[:at] + words[at + 1 :])


def searched(step: Method, sites: dict[int, MoeBlock], recipe: Recipe, tokens: int) -> int:
    """How many search tokens a step takes of so many; raises if too few of them would fit."""
    spec = recipe.calibration
    return min(tokens, search_budget(list(sites.values()), step.reach(sites), spec.search_tokens, spec.search_memory))


def search_bytes(step: Method, sites: dict[int, MoeBlock], recipe: Recipe, tokens: int) -> list[int]:
    """Bytes of every tensor that is kept of a step's search tokens, layer by layer."""
    count, reach = searched(step, sites, recipe, tokens), step.reach(sites)
    return [
        math.prod(shape) * dtype.itemsize
        for site in (sites.values() if reach else ()) for shape, dtype in search_tensors(site, reach, count).values()
    ]  # fmt: skip
