"""What every compression method is: a frozen dataclass whose fields are its configuration, and what the stages of the job ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import nn

from trimoe.calibration.statistics import LayerStats
from trimoe.errors import UserError
from trimoe.model.decision import Decisions, LayerDecision
from trimoe.model.linears import linears
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton

if TYPE_CHECKING:
    from trimoe.methods.fitting import LayerFit
    from trimoe.methods.lab import Lab

WIDEST = 4  # bytes of a weight, at most, when bounding what is still open
Open = Literal["counts", "ranks", "layers", "depth"]
Topic = Literal["amount", "stored", "speed"]


class Paper(Protocol):
    """A model on paper, as earlier steps leave it. Where it is open which layers go, those of the fewest bytes do, or for `largest` the
    most."""

    skeleton: Skeleton
    largest: bool
    decisions: Decisions
    open: frozenset[Open]

    @property
    def sites(self) -> dict[int, MoeBlock]: ...

    def layer_bytes(self, index: int, decision: LayerDecision | None = None) -> int:
        """Bytes of a layer as it is, or as `decision` would leave it."""

    def alike(self, blocks: Iterable[int], layers: Iterable[int]) -> bool:
        """Whether the same bytes stay whichever of the `blocks` among all `layers` go."""


@dataclass(frozen=True)
class Outlined:
    """What a step does on paper: stand-in decisions of the right sizes, by how many bytes the real ones may differ, what is open until
    there are statistics ("depth": which layers go, and it matters for the bytes), and how many decoder layers ("block") and MoE
    sub-layers ("moe") go, at least and at most."""

    decisions: Decisions
    slack: int = 0
    open: frozenset[Open] = frozenset()
    gone: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """Measurements on versions of a model: so many `streams` of hidden states beside the model's own, in so many `rounds`; `to_the_end`
    where the output is compared, and not hidden states."""

    streams: int
    rounds: int = 1
    to_the_end: bool = True


class Method(ABC):
    """One step of a recipe, whose fields are its configuration. Every method says what it does on paper and how it decides; what it
    does not say is as here. `sites` and `decisions` are of the model as earlier steps leave it."""

    name: ClassVar[str]
    paper: ClassVar[str]
    label: ClassVar[str | None] = None  # what the last walk does to a layer's matrices; None: it copies what stays
    mildest: ClassVar[Mapping[str, Any]] = {}  # settings; what is refused with these is refused for the model's sake
    usual: ClassVar[tuple[float, str] | None] = None  # the share that went without much harm in our runs, and what more of it did
    writes_computed: ClassVar[bool] = False  # whether weights are written from what was computed with
    progressive: ClassVar[bool] = True  # whether matrices are fitted to what changed layers before give, not to the original's inputs
    trainable: ClassVar[bool] = True  # whether what it leaves can be trained

    # ---- on paper

    @property
    def needs(self) -> frozenset[str]:
        """Statistics to gather beyond routing and outputs."""
        return frozenset()

    @property
    def gathers(self) -> bool:
        """Whether a pass over the calibration text comes before the decision."""
        return False

    def reach(self, sites: Mapping[int, MoeBlock]) -> int:
        """Among how many of a token's best experts the Gram is wanted; 0 if none is."""
        return 0

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:  # noqa: B027 (a step may have nothing to refuse)
        """Raises UserError for every mistake that can be found without a weight."""

    @abstractmethod
    def outline(self, paper: Paper) -> Outlined:
        """What the step does on paper."""

    def measures(self, skeleton: Skeleton, sites: Iterable[MoeBlock]) -> dict[str, Measure]:
        """What is measured on versions of the model, by name."""
        return {}

    # ---- for people

    def to_json(self) -> dict[str, Any]:
        """Every field, in the form of the YAML file."""
        return plain(self)

    @property
    def reads_text(self) -> bool:
        """Whether what the step decides or fits depends on calibration text."""
        return True

    @property
    def text_hint(self) -> str | None:
        """How the step could do without the text that it reads, as a sentence; None where it cannot."""
        return None

    @property
    def amount(self) -> float | None:
        """The share of what the step works on that goes; None where it is not said as one."""
        return None

    @property
    def stock_settings(self) -> dict[str, str]:
        """Fields, and what they would have to be, where the step's result needs trimoe's own form."""
        return {}

    def stock_method(self, skeleton: Skeleton) -> str | None:
        """The method that would do in the place of this one, where no field of it makes the result a stock one."""
        return None

    def cautions(self, sites: Mapping[int, MoeBlock]) -> dict[Topic, str]:
        """What a plan warns of, by what it is about."""
        return {}

    def foretell(
        self, sites: Mapping[int, MoeBlock], layers: Iterable[tuple[int, LayerStats]]
    ) -> tuple[list[str], dict[int, tuple[int, ...]]]:
        """What the statistics of all layers say of the step beforehand: warnings, and experts that may go from each layer."""
        return [], {}

    # ---- the last walk

    def fit(self, layer: LayerFit) -> tuple[Any, dict[str, Any]]:
        """Change a layer's matrices in place. Returns what is written where that is not the matrices themselves (factors, integers),
        and what is recorded of the layer. It is asked of methods with a `label`; the others change nothing."""
        return None, {}

    @property
    def divides(self) -> bool:
        """Whether each expert can be fitted without the others."""
        return True

    @property
    def calibrated(self) -> bool:
        """Whether matrices are fitted to what they are given."""
        return False

    @property
    def records(self) -> bool:
        """Whether a plan counts the inputs of a layer beside it."""
        return self.calibrated

    @property
    def beyond_experts(self) -> bool:
        """Whether matrices beside the routed experts change."""
        return False

    def fit_bytes(self, site: MoeBlock) -> int:
        """Bytes of fitting one expert: moments, their factors and eigenvectors, the matrix itself, in float64."""
        return 8 * max(6 * n * n + 6 * m * n for m, n in ((site.first, site.hidden), (site.hidden, site.width)))

    def made_bytes(self, site: MoeBlock, decision: LayerDecision, itemsize: int) -> int:
        """Bytes of what a layer's experts become, and of its copy on the way to the disk."""
        return len(decision.keep) * site.expert_parameters * itemsize

    # ---- from measurements to decisions

    @abstractmethod
    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        """What becomes of the layers that the step changes, and what is recorded of it."""


def plain(value: Any) -> dict[str, Any]:
    """A dataclass as a mapping, and all dataclasses in it."""
    out = {}
    for entry in fields(value):
        item = getattr(value, entry.name)
        out[entry.name] = plain(item) if is_dataclass(item) else list(item) if isinstance(item, tuple) else item
    return out


def last_label(steps: Iterable[Method]) -> str:
    """What the last walk does, by the last step that changes matrices."""
    labels = [step.label for step in steps if step.label is not None]
    return f"{labels[-1]} and write" if labels else "Write"


class Fitted(Method):
    """What quantize and weight_prune share: matrices get other numbers in the last walk, and no statistics are gathered for it."""

    scope: str

    @property
    def reads_text(self) -> bool:
        return self.calibrated

    @property
    def beyond_experts(self) -> bool:
        return self.scope != "experts"

    def fit_bytes(self, site: MoeBlock) -> int:
        return super().fit_bytes(site) if self.calibrated else 4 * 6 * max(site.first, site.width) * site.hidden

    def outline(self, paper: Paper) -> Outlined:
        return Outlined(self.with_linears(paper.skeleton, paper.sites, paper.decisions))

    @abstractmethod
    def forms(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """The form of every layer that has experts left."""

    @abstractmethod
    def takes(self, sites: Iterable[MoeBlock], module: nn.Linear) -> bool:
        """Whether a matrix outside the experts can have that form too."""

    def decide(self, lab: Lab) -> tuple[Decisions, dict[str, Any]]:
        return self.with_linears(lab.skeleton, lab.sites, lab.decisions), {}

    def refuse_factored(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        for index, site in sites.items():
            if site.factored or decisions[index].factored:
                raise UserError(
                    f"{self.name}: the experts of layer {index} are factored; use low_rank with form: dense, or leave {self.name} out."
                )

    def with_linears(self, skeleton: Skeleton, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """The decisions, and the linears that `scope` has beside the experts: "moe" shared experts, "all-linear" all matrices of the
        decoder layers. Layers without experts take over the bits or zeros that the others have."""
        out = {**decisions, **self.forms(sites, decisions)}
        if self.scope == "experts":
            return out
        like = next(decision for decision in out.values() if decision.changed)
        plain = replace(like, keep=(), in_ranks=None, out_ranks=None, separate=False, merged=False)
        for index in range(len(skeleton.layers)):
            decision = out.get(index)
            if decision is not None and decision.gone == "block":
                continue
            gone = decision is not None and decision.gone is not None
            inside = f"{skeleton.sites[index].block}." if index in skeleton.sites else None
            paths = tuple(
                path
                for path, module in linears(skeleton, index, block=not gone).items()
                if self.takes(sites.values(), module) and (self.scope == "all-linear" or (inside is not None and path.startswith(inside)))
            )
            if paths:
                base = plain if decision is None else replace(plain, gone=decision.gone, keep=decision.keep) if gone else decision
                out[index] = replace(base, linears=paths)
        return out


def share_of(ratio: float | None, count: int | None, what: str, per_layer: int) -> float:
    """`ratio`, or `count` per layer as a ratio; exactly one of them is allowed."""
    if (ratio is None) == (count is None):
        raise UserError(f"{what}: give ratio or count{'' if ratio is None else ', not both'}.")
    return ratio if ratio is not None else count / per_layer  # type: ignore[operator]
