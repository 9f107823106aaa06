"""Before and after on paper: sizes to the byte, what loads the result, every user error that can be found without reading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.headers import DTYPES
from trimoe.errors import UserError
from trimoe.methods.method import WIDEST
from trimoe.model.decision import Decisions, LayerDecision, unchanged
from trimoe.model.linears import linears
from trimoe.model.moe_block import MoeBlock
from trimoe.model.precision import compute_dtype
from trimoe.model.skeleton import Skeleton
from trimoe.output.layout import Layout
from trimoe.plan import measurements, memory, recovery_memory
from trimoe.plan.disk import output_need, spilled
from trimoe.plan.engines import check_target, loading
from trimoe.plan.outline import Outline
from trimoe.plan.token_cost import LayerCosts, context_of, head_matrix, of_layers
from trimoe.plan.warnings import advice
from trimoe.recipe.recipe import Recipe, with_calibration
from trimoe.recipe.recipe import load as load_recipe
from trimoe.show.answer import Answer
from trimoe.show.format import PER
from trimoe.text.samples import most_tokens


@dataclass(frozen=True)
class Sizes:
    """Parameters, bytes and what one token costs. `active`: parameters one token uses; `flops`: see token_cost.py. `file_bytes` are all safetensors
    files with headers; where decisions are still open, `file_bytes`, `parameters` and `experts` are the most and `least_bytes` the least it can
    be, and everything else is of the stand-in that the most belongs to. `cache_bytes`: of 1,000 tokens of one sequence, `state_bytes` of
    them whatever its length; None where the architecture does not run hollow."""

    parameters: int
    active: int
    experts: int
    file_bytes: int
    least_bytes: int
    flops: int
    cache_bytes: int | None
    state_bytes: int | None

    @property
    def exact(self) -> bool:
        return self.file_bytes == self.least_bytes


@dataclass(frozen=True)
class Plan:
    """What a recipe makes of a model. `str(plan)` is the table; `bytes` the output's size if it is fixed already, else None. docs/plan.md
    says what every field holds."""

    model: str
    recipe: dict[str, Any]
    before: Sizes
    after: Sizes
    layers: list[dict[str, Any]]
    form: str
    loads_in: dict[str, Answer]
    peak_memory: int
    disk: int
    warnings: list[str]
    dense_layers: dict[str, Any]
    context: int
    disk_split: dict[str, int]
    spill: int
    memory_split: dict[str, int]
    depth: dict[str, list[int]]
    device_split: dict[str, int] = field(default_factory=dict)
    measured_on: list[dict[str, Any]] = field(default_factory=list)

    @property
    def bytes(self) -> int | None:
        return self.after.file_bytes if self.after.exact else None

    @property
    def held(self) -> memory.PeakMemory:
        """What it takes, to be compared with what there is (how many logits are held at once goes by the machine's memory)."""
        return memory.PeakMemory(self.memory_split, self.device_split)

    def to_json(self) -> dict[str, Any]:
        loads_in = {engine: answer.words for engine, answer in self.loads_in.items()}
        return {
            **self.__dict__, "before": self.before.__dict__, "after": self.after.__dict__, "loads_in": loads_in, "bytes": self.bytes
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        body = {key: entry for key, entry in value.items() if key != "bytes"}
        loads_in = {engine: Answer.from_json(words) for engine, words in value["loads_in"].items()}
        return cls(**{**body, "before": Sizes(**value["before"]), "after": Sizes(**value["after"]), "loads_in": loads_in})

    def __str__(self) -> str:
        from trimoe.show.plan import plain

        return plain(self.to_json())


def plan(
    model: str | Checkpoint | Skeleton,
    recipe: str | dict[str, Any] | Recipe,
    changes: str | Sequence[str] = (),
    *,
    calibration: str | Sequence[str] = (),
    samples: int | None = None,
    length: int | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "auto",
) -> Plan:
    """Before any statistics: exact where the recipe fixes the result, an interval where decisions will. `calibration`, `samples`, `length`
    take the place of the recipe's; `device` and `dtype` are as for compress (a skeleton has its own dtype). Raises
    UserError for a recipe that cannot be, and for a text of this machine that is not there or too short."""
    parsed = with_calibration(load_recipe(recipe, changes), calibration, samples, length)
    skeleton = model if isinstance(model, Skeleton) else skeleton_for(model, [parsed], dtype, device, weights=False)
    forms, spec = _forms(skeleton, parsed), parsed.calibration
    layout, smaller, most = forms.layout, forms.smaller, forms.most
    tokens = most_tokens(spec.sources, spec.samples, min(spec.length, skeleton.context))
    open_ = Bounds(
        slack=most.slack + _header_slack(layout) if most.open_bytes else 0, parameters=most.slack // WIDEST, least_bytes=smaller.nbytes,
        counts="counts" in most.open, layers="layers" in most.open, ranks=bool(most.open & {"counts", "ranks"}), gone=most.gone,
    )  # fmt: skip
    made = describe(skeleton, layout, parsed, native=forms.native, tokens=tokens, open_=open_, device=device)
    if parsed.recover is not None:
        held, why = memory.fitting(skeleton, parsed.recover, device, made.after.parameters, recovery_memory.weights(skeleton))
        if why is not None:
            split = made.memory_split | held.host
            made = replace(
                made, memory_split=split, device_split=made.device_split | held.device, peak_memory=max(split.values()),
                warnings=[*made.warnings, f"{why}."],
            )  # fmt: skip
    return replace(
        made,
        warnings=[*made.warnings, *(f"{words}; compress would refuse that without --any-memory." for words in made.held.short(device))],
    )


def skeleton_for(
    model: str | Checkpoint, recipes: Sequence[Recipe], dtype: str | torch.dtype, device: str, *, weights: bool = True
) -> Skeleton:
    """A model on paper in the precision that `dtype` means for these recipes on this device. "auto" is float32 where bfloat16 would round
    weights that a recipe writes as they were computed with."""
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model, weights=weights)
    found = compute_dtype(dtype, device)
    if dtype == "auto" and any(map(_writes_computed, recipes)):
        stored = {DTYPES[info.dtype] for info in checkpoint.tensors.values() if len(info.shape) > 1}
        if any(torch.promote_types(kind, found) != found for kind in stored if kind.is_floating_point):
            found = torch.float32
    return Skeleton(checkpoint, found)


def _writes_computed(recipe: Recipe) -> bool:
    """Factors, pruned weights, and matrices that stay dense beside them, are written from what was computed with."""
    return any(step.writes_computed for step in recipe.steps)


def _refuse_narrow(recipe: Recipe, skeleton: Skeleton) -> None:
    """Raises UserError where writing what was computed with would round stored weights."""
    names = [f"{skeleton.layer_name(i)}.{site.block}.{path}" for i, site in skeleton.sites.items() for path in site.expert_paths()]
    if any(step.writes_computed and step.beyond_experts for step in recipe.steps):
        names += [
            f"{skeleton.layer_name(i)}.{path}.weight" for i in range(len(skeleton.layers)) for path in linears(skeleton, i, block=True)
        ]
    keys = [key for name in names for key in skeleton.source_keys(name)]
    stored = {DTYPES[skeleton.checkpoint.tensors[key].dtype] for key in keys}
    wider = [dtype for dtype in stored if torch.promote_types(dtype, skeleton.dtype) != skeleton.dtype]
    step = next((step for step in recipe.steps if step.writes_computed), None)
    if wider and step is not None:
        raise UserError(
            f"{step.name} in {skeleton.dtype} would round weights that {skeleton.name} keeps in {wider[0]}; give --dtype float32."
        )


def check(skeleton: Skeleton, recipe: str | dict[str, Any] | Recipe) -> None:
    """Raises the UserError that `plan` would raise of a recipe on this model, without working out what the result weighs."""
    _forms(skeleton, load_recipe(recipe))


@dataclass(frozen=True)
class _Forms:
    """A recipe's most and least on paper, checked: the layout of the most, of the least, and whether the result is native."""

    most: Outline
    layout: Layout
    smaller: Layout
    native: bool


def _forms(skeleton: Skeleton, recipe: Recipe) -> _Forms:
    _check_recovery(recipe)
    if skeleton.checkpoint.scheme is not None:
        raise UserError(f"{skeleton.name} is already quantised; give the bf16, fp16 or fp32 checkpoint it was made from.")
    most = Outline(skeleton, recipe, largest=False)
    least = Outline(skeleton, recipe, largest=True) if "depth" in most.open else most  # the two differ in the layers that go
    layout = Layout(skeleton, most.decisions).examined()
    smaller = Layout(skeleton, least.decisions).examined() if "depth" in least.open else layout
    stored = layout.native or smaller.native
    check_target(recipe, native := stored or "counts" in most.open, skeleton, least.decisions)
    _refuse_lone_experts(stored, skeleton, least.decisions)
    _refuse_narrow(recipe, skeleton)
    return _Forms(most, layout, smaller, native)


def _refuse_lone_experts(native: bool, skeleton: Skeleton, decisions: Decisions) -> None:
    """A stock configuration that counts one expert is no MoE model to what loads it; native ones say it layer by layer. Where counts are
    open, those of the decisions add up to what they will be: all are one, or none of them need be."""
    left = {len(decision.keep) for index, decision in decisions.items() if index in skeleton.sites and decision.gone is None}
    if not native and left == {1} and skeleton.num_experts > 1:
        raise UserError("The recipe leaves one expert in every layer, which a stock checkpoint cannot say; let more of them stay.")


@dataclass(frozen=True)
class Bounds:
    """What decisions may still change of a layout that stands for them: `slack` bytes and `parameters` either way (none where all is fixed),
    `least_bytes` of the smallest that it may be, whether it is open how many experts stay where (`counts`), which `layers` do, what `ranks` they get; `gone`:
    how many decoder layers ("block") and MoE sub-layers ("moe") go, at least and at most."""

    slack: int
    parameters: int
    least_bytes: int
    counts: bool
    layers: bool
    ranks: bool
    gone: dict[str, tuple[int, int]]

    @property
    def kept(self) -> bool:
        return self.counts or self.layers


def _check_recovery(recipe: Recipe) -> None:
    if recipe.recover is not None and recipe.recover.adapter:
        raise UserError(
            "recover: adapter: true in a recipe would lose the folder that the adapter belongs to; compress first, then trimoe recover."
        )
    fixed = next((step.name for step in recipe.steps if not step.trainable), None)
    if recipe.recover is not None and fixed is not None:
        raise UserError(
            f"recover: training cannot change packed integers; leave {fixed} out, or train adapters with trimoe recover --adapter."
        )


def _header_slack(layout: Layout) -> int:
    """How far headers may differ when expert numbers, shapes and offsets change by a few digits."""
    entries = sum(len(group) for group in layout.groups)
    return 24 * entries + 4096


def final_plan(skeleton: Skeleton, decisions: Decisions, recipe: Recipe, tokens: int, device: str) -> Plan:
    """After all decisions: exact."""
    layout = Layout(skeleton, decisions).examined()
    check_target(recipe, layout.native, skeleton, decisions)
    _refuse_lone_experts(layout.native, skeleton, decisions)
    blocks = len(skeleton.layers) - len(layout.place)
    moe = sum(decisions[index].gone is not None for index in skeleton.sites)
    decided = Bounds(0, 0, layout.nbytes, counts=False, layers=False, ranks=False, gone={"block": (blocks, blocks), "moe": (moe, moe)})
    return describe(skeleton, layout, recipe, native=layout.native, tokens=tokens, open_=decided, device=device)


def describe(
    skeleton: Skeleton, layout: Layout, recipe: Recipe, *, native: bool, tokens: int, open_: Bounds, device: str
) -> Plan:  # fmt: skip
    """The plan of a layout, which stands for all that are still possible."""
    original = Layout(skeleton, unchanged(skeleton.sites))
    then, now = of_layers(skeleton, original), of_layers(skeleton, layout)
    before, after = sizes(skeleton, original, then), sizes(skeleton, layout, now, open_)
    # where it is open which layers go, each is shown as it is if it stays
    seen = _all_left(skeleton, layout.decisions) if open_.kept else layout.decisions
    shown = now if seen == layout.decisions else of_layers(skeleton, Layout(skeleton, seen))
    rows = []
    for index in range(len(skeleton.layers)):
        site, decision = skeleton.sites.get(index), seen.get(index)
        if site is None and (open_.kept or decision is None or decision.gone is None):
            continue  # dense layers that stay are summed up
        rows.append(
            {"layer": index, "experts": 0 if site is None else site.num_experts, **_form(site, decision, open_),
             "before": then[index].to_json(), "after": shown[index].to_json()}
        )  # fmt: skip
    moe = {row["layer"] for row in rows}
    rest = {
        name: [sum(getattr(one[i], what) for i in range(len(skeleton.layers)) if i not in moe) for one in (then, now)]
        for name, what in (("bytes", "nbytes"), ("parameters", "parameters"), ("flops", "flops"))
    }  # fmt: skip
    held = memory.of_stages(skeleton, recipe, layout.decisions, tokens, after.parameters, device)
    disk = output_need(skeleton, recipe, after.file_bytes, tokens)
    return Plan(
        skeleton.name, recipe.to_json(), before, after, rows, "native" if native else "stock",
        loading(skeleton, layout, native=native),
        max(held.host.values()), sum(disk.values()), advice(skeleton, recipe, after.experts / before.experts, tokens=tokens, native=native),
        dense_layers={"count": len(skeleton.layers) - len(moe), **rest}, context=context_of(skeleton), disk_split=disk,
        spill=spilled(skeleton, recipe, tokens), memory_split=held.host, depth=_depth(skeleton, open_),
        device_split=held.device, measured_on=measurements.on_paper(skeleton, recipe, tokens),
    )  # fmt: skip


def _depth(skeleton: Skeleton, open_: Bounds) -> dict[str, list[int]]:
    """Decoder layers and those with experts: [before, after at least, after at most]."""
    before = {"block": len(skeleton.layers), "moe": len(skeleton.sites)}
    return {
        name: [before[kind], before[kind] - open_.gone[kind][1], before[kind] - open_.gone[kind][0]]
        for name, kind in (("layers", "block"), ("moe_layers", "moe"))
    }


def _all_left(skeleton: Skeleton, decisions: Decisions) -> Decisions:
    """The same, with no layer dropped: those that the stand-in drops are as another of their kind that it keeps."""

    def kind(index: int) -> Any:
        return [(name, tensor.shape) for name, tensor in skeleton.layers[index].named_parameters()]

    kept = [index for index in skeleton.sites if decisions[index].gone is None]
    found = {}
    for index, decision in decisions.items():
        like = next((other for other in kept if decision.gone and index in skeleton.sites and kind(other) == kind(index)), index)
        found[index] = replace(decisions[like], gone=None)
    return found


def _form(site: MoeBlock | None, decision: LayerDecision | None, open_: Bounds) -> dict[str, Any]:
    """How many experts a layer keeps, and in which form. None: not known yet, or not so."""
    assert decision is not None
    rank: Any = None
    if decision.in_ranks is not None:
        rank = "?" if open_.ranks else _mean(decision.in_ranks) + " / " + _mean(decision.out_ranks or ())
    kept = 0 if decision.gone or site is None else len(decision.keep)
    sparsity = f"{decision.pattern[0]}:{decision.pattern[1]}" if decision.pattern else decision.sparsity
    return {
        "kept": None if open_.kept else kept, "if_it_stays": None if open_.counts else len(decision.keep),
        "rank": rank, "bits": decision.bits, "sparsity": sparsity,
        "gone": None if open_.kept else decision.gone,
    }  # fmt: skip


def _mean(ranks: Sequence[int]) -> str:
    cut = [rank for rank in ranks if rank >= 0]
    dense = len(ranks) - len(cut)
    text = f"{sum(cut) / len(cut):.0f}" if cut else "-"
    return text + (f" ({dense} dense)" if dense else "")


def sizes(skeleton: Skeleton, layout: Layout, layers: list[LayerCosts], open_: Bounds | None = None) -> Sizes:
    """The whole model's, from its layers and what lies outside them."""
    outside = layout.groups[0].parameters
    slack, more, low = (0, 0, layout.nbytes) if open_ is None else (open_.slack, open_.parameters, open_.least_bytes)
    cached = None if any(layer.cache is None for layer in layers) else [layer.cache for layer in layers if layer.cache is not None]
    return Sizes(
        outside + sum(layer.parameters for layer in layers) + more, outside + sum(layer.active for layer in layers),
        sum(layer.experts for layer in layers) + more, layout.nbytes + slack, low - slack,
        2 * head_matrix(skeleton) + sum(layer.flops for layer in layers),
        None if cached is None else sum(cache.nbytes(PER) for cache in cached),
        None if cached is None else sum(cache.state_bytes for cache in cached),
    )  # fmt: skip
