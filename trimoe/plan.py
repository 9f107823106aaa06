"""Before and after on paper: sizes to the byte, what loads the result, every user error that can be found without reading a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimoe import depth
from trimoe.checkpoint import Checkpoint
from trimoe.errors import UserError
from trimoe.layout import Layout
from trimoe.methods import Quantize, WeightPrune
from trimoe.methods.low_rank import rank_share
from trimoe.methods.method import Decisions, LayerDecision, unchanged
from trimoe.paper import Paper, search_memory
from trimoe.recipe import Recipe
from trimoe.recipe import load as load_recipe
from trimoe.skeleton import LOGITS, Site, Skeleton
from trimoe.spill import BUDGET

ENGINES = ("transformers", "vllm", "sglang", "llama.cpp")
IMPORTS = 700 << 20  # bytes of memory that Python, torch and transformers take themselves


@dataclass(frozen=True)
class Sizes:
    """Parameters and bytes. `active`: parameters one token uses. `file_bytes` are all safetensors files with headers; where decisions
    are still open, `file_bytes` is the most and `least_bytes` the least it can be, and the parameter counts are the most."""

    parameters: int
    active: int
    experts: int
    file_bytes: int
    least_bytes: int

    @property
    def exact(self) -> bool:
        return self.file_bytes == self.least_bytes


@dataclass(frozen=True)
class Plan:
    """What a recipe makes of a model. `str(plan)` is the table; `bytes` the output's size if it is fixed already, else None."""

    model: str
    recipe: dict[str, Any]
    before: Sizes
    after: Sizes
    layers: list[dict[str, Any]]
    form: str
    loads_in: dict[str, str]
    peak_memory: int
    disk: int
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int | None:
        return self.after.file_bytes if self.after.exact else None

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "before": self.before.__dict__, "after": self.after.__dict__, "bytes": self.bytes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        body = {key: entry for key, entry in value.items() if key != "bytes"}
        return cls(**{**body, "before": Sizes(**value["before"]), "after": Sizes(**value["after"])})

    def __str__(self) -> str:
        b, a = self.before, self.after
        size = f"{a.file_bytes:,}" if a.exact else f"{a.least_bytes:,} to {a.file_bytes:,}"
        sign = "" if a.exact else "at most "
        lines = [
            f"{self.model} -> {self.form} checkpoint",
            f"  safetensors bytes     {b.file_bytes:,} -> {size}  ({a.file_bytes / b.file_bytes:.1%})",
            f"  parameters            {b.parameters:,} -> {sign}{a.parameters:,}",
            f"  active per token      {b.active:,} -> {sign}{a.active:,}",
            f"  routed experts        {b.experts:,} -> {sign}{a.experts:,}  ({a.experts / b.experts:.1%})",
            f"  memory while working  about {human(self.peak_memory)}; disk {human(self.disk)}",
            "  loads in              " + "; ".join(f"{engine}: {answer}" for engine, answer in self.loads_in.items()),
        ]
        rows = [
            f"    {row['layer']:>5}  {row['experts']:>3} -> {row['kept'] if row['kept'] is not None else '?':>3}"
            + (f"  rank {row['rank']}" if row.get("rank") is not None else "")
            + {None: "", "moe": "  MoE sub-layer dropped", "block": "  layer dropped"}[row.get("gone")]
            for row in self.layers
        ]
        return "\n".join([*lines, "  layer  experts", *rows, *(f"  warning: {warning}" for warning in self.warnings)])


def human(count: float) -> str:
    """1234567890 -> '1.15 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def plan(
    model: str | Checkpoint | Skeleton,
    recipe: str | dict[str, Any] | Recipe,
    changes: Sequence[str] = (),
    *,
    samples: int | None = None,
    length: int | None = None,
) -> Plan:
    """Before any statistics: exact where the recipe fixes the result, an interval where decisions will."""
    parsed = load_recipe(recipe, changes)
    _check_recovery(parsed)
    skeleton = model if isinstance(model, Skeleton) else Skeleton.of(model, weights=False)
    if skeleton.checkpoint.scheme is not None:
        raise UserError(f"{skeleton.name} is already quantised; give the bf16, fp16 or fp32 checkpoint it was made from.")
    most, least = Paper(skeleton, parsed, largest=False), Paper(skeleton, parsed, largest=True)
    layout = Layout(skeleton, most.decisions)
    smaller = Layout(skeleton, least.decisions) if least.open_depth else layout
    native = layout.native or smaller.native or most.open_counts
    _check_target(parsed, native, skeleton, least.decisions)
    return describe(
        skeleton, layout, parsed, native=native, kept_known=not (most.open_counts or most.open_depth),
        slack=most.slack + _header_slack(layout) if most.open_bytes else None, least_bytes=smaller.nbytes,
        tokens=(samples or parsed.calibration.samples) * min(length or parsed.calibration.length, skeleton.context),
    )  # fmt: skip


def _check_recovery(recipe: Recipe) -> None:
    if recipe.recover is not None and recipe.recover.adapter:
        raise UserError(
            "recover: adapter: true in a recipe would lose the folder that the adapter belongs to; compress first, then trimoe recover."
        )
    if recipe.recover is not None and any(isinstance(step, Quantize) for step in recipe.steps):
        raise UserError(
            "recover: training cannot change packed integers; leave quantize out, or train adapters with trimoe recover --adapter."
        )


def _header_slack(layout: Layout) -> int:
    """How far headers may differ when expert numbers, shapes and offsets change by a few digits."""
    entries = sum(len(group) for group in layout.groups)
    return 24 * entries + 4096


def final_plan(skeleton: Skeleton, decisions: Decisions, recipe: Recipe, tokens: int) -> Plan:
    """After all decisions: exact."""
    layout = Layout(skeleton, decisions)
    _check_target(recipe, layout.native, skeleton, decisions)
    return describe(skeleton, layout, recipe, native=layout.native, slack=None, kept_known=True, tokens=tokens)


def _by_number(skeleton: Skeleton, decisions: Decisions) -> bool:
    """Whether the result has layers of several kinds, or dense ones of zeros, in other places than its family has them: transformers
    reads that from config.json, other engines may go by the layer's number."""
    gone = [decision.gone for decision in decisions.values() if decision.gone]
    kinds = set(depth.explicit(skeleton, {}).get("layer_types") or ())
    return "moe" in gone or ("block" in gone and len(kinds) > 1)


def _check_target(recipe: Recipe, native: bool, skeleton: Skeleton, decisions: Decisions) -> None:
    if recipe.target != "transformers" and _by_number(skeleton, decisions):
        raise UserError(
            f"The recipe's target is {recipe.target}, which may take a layer's kind from its number, and the dropped layers change the "
            "numbers; use expert_drop, or target: transformers."
        )
    if recipe.target not in ("transformers", "vllm") and any(decision.bits for decision in decisions.values()):
        raise UserError(
            f"The recipe's target is {recipe.target}, which does not read compressed-tensors; use target: vllm or transformers."
        )
    if native and recipe.target != "transformers":
        raise UserError(
            f"The recipe's target is {recipe.target}, but different expert counts per layer, factored experts, zeros left out and, in this "
            "family, dropped MoE sub-layers load in transformers only; use counts: uniform with a ratio that removes equally many everywhere, "
            "form: dense and block_drop, or target: transformers."
        )


def describe(
    skeleton: Skeleton, layout: Layout, recipe: Recipe, *, native: bool, slack: int | None, kept_known: bool, tokens: int,
    least_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """The plan of a layout; `slack` bytes either way where decisions are open (None: exact), `least_bytes` of the smallest that it may be."""
    before_layout = Layout(skeleton, unchanged(skeleton.sites))
    before, after = _sizes(skeleton, before_layout, None), _sizes(skeleton, layout, slack, least_bytes)
    rows = []
    for index, site in skeleton.sites.items():
        decision = layout.decisions[index]
        rank: Any = None
        if decision.in_ranks is not None:
            rank = "?" if slack is not None else _mean(decision.in_ranks) + " / " + _mean(decision.out_ranks or ())
        kept = 0 if decision.gone else len(decision.keep)
        rows.append(
            {"layer": index, "experts": site.num_experts, "kept": kept if kept_known else None, "rank": rank,
             "gone": decision.gone if kept_known else None}
        )  # fmt: skip
    if kept_known:
        rows += [
            {"layer": index, "experts": 0, "kept": 0, "rank": None, "gone": decision.gone}
            for index, decision in layout.decisions.items() if index not in skeleton.sites
        ]  # fmt: skip
        rows.sort(key=lambda row: row["layer"])
    kind = skeleton.config.model_type
    squeezed = any(decision.bitmask for decision in layout.decisions.values())
    reason = "zeros are left out of the files" if squeezed else "layers differ in form, or experts are factored"
    others = f"no ({reason})" if native else f"yes, where it supports {kind} (one expert count everywhere)"
    own = ["import trimoe or trust_remote_code=True"] if native else []
    if any(decision.bits for decision in layout.decisions.values()):
        own.append("compressed-tensors installed")
        others = others if native else "made for it, not tried (compressed-tensors)"
    if not native and _by_number(skeleton, layout.decisions):
        others = "not known: it may take a layer's kind from its number"
    loads = dict.fromkeys(ENGINES, others) | {"transformers": "yes" + (f", with {' and '.join(own)}" if own else "")}
    if any(decision.bits for decision in layout.decisions.values()):
        loads["llama.cpp"] = "no (it does not read compressed-tensors)"
    hidden = min(BUDGET, next(iter(skeleton.sites.values())).hidden * tokens * skeleton.dtype.itemsize)
    search = max(search_memory(step, dict(skeleton.sites), recipe) for step in recipe.steps)
    logits = 5 * 4 * min(LOGITS, 2048 * skeleton.config.get_text_config().vocab_size)
    peak = int(2.5 * skeleton.largest_layer + 2 * hidden + search + logits + IMPORTS)
    extra = (
        [f"{len(skeleton.ignored_keys)} tensors that transformers does not use (such as {skeleton.ignored_keys[0]}) are left out."]
        if skeleton.ignored_keys
        else []
    )
    return Plan(
        skeleton.name, recipe.to_json(), before, after, rows, "native" if native else "stock", loads, peak,
        after.file_bytes * (1 if recipe.recover is None else 2), extra + _warnings(recipe, before, after),
    )  # fmt: skip


def _mean(ranks: Sequence[int]) -> str:
    cut = [rank for rank in ranks if rank >= 0]
    dense = len(ranks) - len(cut)
    text = f"{sum(cut) / len(cut):.0f}" if cut else "-"
    return text + (f" ({dense} dense)" if dense else "")


def _sizes(skeleton: Skeleton, layout: Layout, slack: int | None, least_bytes: int | None = None) -> Sizes:
    parameters = sum(entry.parameters for group in layout.groups for entry in group)
    experts = inactive = 0
    for index, site in skeleton.sites.items():
        decision = layout.decisions[index]
        if decision.gone is not None:
            continue
        here = _expert_parameters(skeleton, site, decision)
        experts += here
        inactive += here - round(here * min(1.0, site.rule.top_k / len(decision.keep)))
    low = layout.nbytes if least_bytes is None else least_bytes
    return Sizes(parameters, parameters - inactive, experts, layout.nbytes + (slack or 0), low - (slack or 0))


def _expert_parameters(skeleton: Skeleton, site: Site, decision: LayerDecision) -> int:
    biases = sum(
        math.prod(tensor.shape[1:])
        for name, tensor in site.experts_of(skeleton.layers[site.layer]).named_parameters(recurse=False)
        if name.endswith("_bias")
    )
    if decision.factored:
        assert decision.in_ranks is not None and decision.out_ranks is not None
        weights = rank_share(decision.in_ranks, site.first, site.hidden) + rank_share(decision.out_ranks, site.hidden, site.width)
    else:
        weights = len(decision.keep) * (site.first * site.hidden + site.hidden * site.width)
    return weights + len(decision.keep) * biases


def _warnings(recipe: Recipe, before: Sizes, after: Sizes) -> list[str]:
    share = after.experts / before.experts
    found = []
    if share < 0.5 - 1e-3:
        found.append(f"only {share:.0%} of the expert parameters stay; beyond half, recovery training is usually needed.")
    if any(isinstance(step, WeightPrune) and step.form == "dense" for step in recipe.steps):
        found.append("zeros are stored like other numbers: weight_prune makes nothing smaller (but with form: bitmask) and nothing faster.")
    return found
