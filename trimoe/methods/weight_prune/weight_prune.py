"""Zeros inside expert matrices: MoE-Pruner arXiv 2410.12013, Wanda arXiv 2306.11695, SparseGPT arXiv 2301.00774, magnitude.

Zeros make nothing smaller or faster by themselves: engines multiply them like other numbers (see docs/methods/weight-prune.md for what they are good
for). `form: bitmask` leaves them out on disk.

Letters: S routed tokens of one expert, H hidden size, I expert width (or inputs of any matrix), O = 2I (gated) or I.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional as F

from trimoe.errors import UserError
from trimoe.methods.fitting import LayerFit
from trimoe.methods.method import Fitted, Topic
from trimoe.methods.weight_prune.masks import (
    Pattern,
    input_norms,
    keep_pattern,
    keep_per_layer,
    keep_per_row,
    magnitude,
    sparsegpt,
    weighted,
)
from trimoe.model.decision import Decisions
from trimoe.model.expert import activate, matrices
from trimoe.model.moe_block import MoeBlock
from trimoe.walk.expert_inputs import FEW, ExpertInputs, LayerInputs, LayerSample
from trimoe.walk.expert_shards import Share
from trimoe.walk.finite import checked


def _unread(value: Any) -> Any:
    """YAML takes 2:4 without quotes for a number to the base of 60."""
    return "{}:{}".format(*divmod(value, 60)) if type(value) is int else value


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WeightPrune(Fitted):
    """Set the weights that matter least to zero, in every matrix of the routed experts.

    ratio     share of the weights that go; or
    pattern   "n:m": n of every m consecutive inputs stay, such as "2:4"
    score     `moe_pruner`: |w| times the norm of its input, each token weighted by its routing weight; `wanda`: the same with every routed
              token counted alike; `magnitude`: |w|, without calibration text; `sparsegpt`: what the weights that stay cannot make up for,
              and they do make up for it. An expert without tokens is pruned by |w| (`sparsegpt`: by its layer's inputs)
    compare   `row`: among the weights of one output, as the papers do, so every expert loses the same share; `layer`: among all experts of
              a layer (their first projections, and their last), so that rarely used experts lose more
    scope     `experts`: routed ones; `moe`: shared experts too; `all-linear`: attention and dense MLPs as well. Routers never
    form      `dense`: zeros are stored; `bitmask`: a bit a weight and the others' values, about 0.56 of dense at one half in 16 bits; only
              trimoe's loader reads that
    """

    name: ClassVar[str] = "weight_prune"
    paper: ClassVar[str] = "arXiv 2410.12013"
    label: ClassVar[str | None] = "Prune"
    mildest: ClassVar[Mapping[str, Any]] = {"ratio": 0.01}
    usual: ClassVar[tuple[float, str] | None] = 0.5, "KL rose from 0.12 at 50 % to 0.83 at 70 %"
    writes_computed: ClassVar[bool] = True

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    pattern: Annotated[str | None, BeforeValidator(_unread)] = None
    score: Literal["moe_pruner", "wanda", "magnitude", "sparsegpt"] = "moe_pruner"
    compare: Literal["row", "layer"] = "row"
    scope: Literal["experts", "moe", "all-linear"] = "experts"
    form: Literal["dense", "bitmask"] = "dense"

    @property
    def calibrated(self) -> bool:
        """Whether calibration text is read."""
        return self.score != "magnitude"

    # ---- on paper

    def shape(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> None:
        if (self.ratio is None) == (self.pattern is None):
            raise UserError(f"weight_prune: give ratio or pattern{'' if self.ratio is None else ', not both'}.")
        if self.compare == "layer" and (self.pattern is not None or self.score == "sparsegpt"):
            raise UserError("weight_prune: compare: layer goes with a ratio and the scores moe_pruner, wanda and magnitude.")
        if self.form == "bitmask" and (self.compare == "layer" or (self.score == "sparsegpt" and self.pattern is None)):
            raise UserError(
                "weight_prune: form: bitmask needs a number of weights a row that is known beforehand; use compare: row and, with sparsegpt, a pattern."
            )
        self.refuse_factored(sites, decisions)
        for site in sites.values():
            widths = {site.hidden, site.width}
            if self.n_of_m is not None and any(width % self.n_of_m.of for width in widths):
                raise UserError(f"weight_prune: {self.n_of_m} does not divide the experts' widths {sorted(widths)}.")
            if self.form == "bitmask" and any(width % 8 for width in widths):
                raise UserError(f"weight_prune: form: bitmask needs widths that are multiples of 8; the experts' are {sorted(widths)}.")

    @property
    def n_of_m(self) -> Pattern | None:
        return None if self.pattern is None else Pattern.parse(self.pattern)

    def forms(self, sites: Mapping[int, MoeBlock], decisions: Decisions) -> Decisions:
        """Sparsity and form of every layer that has experts left."""
        pattern = (self.n_of_m.keep, self.n_of_m.of) if self.n_of_m else None
        made = dict(sparsity=self.ratio, pattern=pattern, bitmask=self.form == "bitmask")
        return {index: replace(decisions[index], **made) for index in sites}  # type: ignore[arg-type]

    def takes(self, sites: Iterable[MoeBlock], module: nn.Linear) -> bool:
        """Whether a matrix outside the experts can be pruned too."""
        of = self.n_of_m.of if self.n_of_m else 1
        return module.in_features % of == 0 and (self.form == "dense" or module.in_features % 8 == 0)

    # ---- for people

    @property
    def amount(self) -> float | None:
        return 1 - self.n_of_m.keep / self.n_of_m.of if self.n_of_m is not None else self.ratio

    @property
    def stock_settings(self) -> dict[str, str]:
        return {"form": "dense"} if self.form == "bitmask" else {}

    def cautions(self, sites: Mapping[int, MoeBlock]) -> dict[Topic, str]:
        if self.form == "bitmask":
            return {}
        return {
            "stored": "zeros are stored like other numbers: weight_prune makes nothing smaller (but with form: bitmask) and nothing faster."
        }

    # ---- the last walk

    @property
    def divides(self) -> bool:
        return self.compare == "row"

    def fit(self, layer: LayerFit) -> tuple[Any, dict[str, Any]]:
        def thinned(path: str) -> torch.Tensor:
            self.linear(layer.weights[path], layer.moments[path])
            return layer.weights[path]

        about = {} if layer.part is None else self._shared(layer.part)
        for path, made in layer.each_linear(thinned).items():
            layer.weights[path].copy_(made)
        return None, about

    def _shared(self, part: Share) -> dict[str, Any]:
        """Prunes all the layer's experts; what there is to know about it: counts added up, shares averaged."""
        own = {} if part.empty else self.transform(part.experts, part.site, part.seen)
        part.complete()
        sizes = [span.stop - span.start for span in part.spans]
        rows = [(size, about) for size, about in zip(sizes, part.team.everyone(own), strict=True) if size]
        if len(rows) == 1:
            return rows[0][1]
        return {
            name: sum(about[name] for _, about in rows)
            if isinstance(value, int)
            else sum(size * about[name] for size, about in rows) / part.whole.num_experts
            for name, value in rows[0][1].items()
        }

    # ---- tensors in, tensors out

    @torch.no_grad()
    def transform(self, experts: Any, site: MoeBlock, seen: LayerInputs | None) -> dict[str, Any]:
        """Prune one layer's experts in place; `site` and `experts` are those after dropping, `seen` is what the layer's block saw
        (`magnitude` does without). Returns how many experts saw no token, and the share of zeros."""
        self._prune_layer(experts, site, seen) if self.compare == "layer" else self._prune_rows(experts, site, seen)
        whole = [tensor for expert in range(site.num_experts) for tensor in matrices(experts, expert)]
        zeros = sum(int((tensor == 0).sum()) for tensor in whole)
        tokens_E = None if seen is None else torch.bincount(seen.index_TK.flatten(), minlength=site.num_experts)
        return {
            "unseen_experts": 0 if tokens_E is None else int((tokens_E == 0).sum()),
            "zeros": zeros / sum(tensor.numel() for tensor in whole),
        }

    def _prune_rows(self, experts: Any, site: MoeBlock, seen: LayerInputs | None) -> None:
        for expert in range(site.num_experts):
            given = _given(experts, expert, seen)  # before the first projection is changed: the papers' order
            for weight, inputs in zip(matrices(experts, expert), given, strict=True):
                if self.score == "sparsegpt":
                    assert inputs is not None
                    weight.copy_(sparsegpt(weight, _moment(inputs), ratio=self.ratio, pattern=self.n_of_m)[0])
                else:
                    _keep(weight, self._mask(self._score(weight, inputs)))

    def _prune_layer(self, experts: Any, site: MoeBlock, seen: LayerInputs | None) -> None:
        """First projections are compared with each other, and last ones."""
        assert self.ratio is not None
        scores: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for expert in range(site.num_experts):
            for kind, weight, inputs in zip(scores, matrices(experts, expert), _given(experts, expert, seen), strict=True):
                kind.append(self._score(weight, inputs))
        for place, kind in enumerate(scores):
            for expert, mask in enumerate(keep_per_layer(kind, self.ratio)):
                _keep(matrices(experts, expert)[place], mask)

    def _score(self, w_OI: torch.Tensor, given: ExpertInputs | None) -> torch.Tensor:
        if given is None or self.score == "magnitude":
            return magnitude(w_OI)
        norm_I = input_norms(given.x_SH, given.gate_S if self.score == "moe_pruner" else None)
        return weighted(w_OI, checked(norm_I, "the norms of what an expert is given", given.x_SH.dtype))

    def _mask(self, score_OI: torch.Tensor) -> torch.Tensor:
        if self.n_of_m is not None:
            return keep_pattern(score_OI, self.n_of_m)
        assert self.ratio is not None
        return keep_per_row(score_OI, self.ratio)

    @torch.no_grad()
    def linear(self, w_OI: torch.Tensor, moment_II: torch.Tensor | None) -> None:
        """Prune a matrix outside the experts in place, row by row; every token counts alike there. Without a moment of its inputs, by |w|."""
        if moment_II is not None and self.score == "sparsegpt":
            w_OI.copy_(sparsegpt(w_OI, moment_II, ratio=self.ratio, pattern=self.n_of_m)[0])
        elif moment_II is not None and self.score != "magnitude":
            _keep(w_OI, self._mask(weighted(w_OI, moment_II.diagonal().clamp_min(0).sqrt())))
        else:
            _keep(w_OI, self._mask(magnitude(w_OI)))


def _keep(w_OI: torch.Tensor, mask_OI: torch.Tensor) -> None:
    w_OI.copy_(torch.where(mask_OI, w_OI, 0))


def _given(experts: Any, expert: int, seen: LayerInputs | None) -> tuple[ExpertInputs | None, ExpertInputs | None]:
    """What the expert's first projection was given, and its last."""
    if seen is None:
        return None, None
    given, (w_in, _) = seen.of(expert), matrices(experts, expert)
    h_SI, pool_PI = (activate(experts, expert, F.linear(x, w_in)) for x in (given.x_SH, given.pool_PH))
    return given, ExpertInputs(h_SI, given.gate_S, LayerSample(pool_PI))


def _moment(given: ExpertInputs) -> torch.Tensor:
    """The mean of x x^T over the expert's tokens; few of them lean on the layer's."""
    x = given.x_SH.float()
    if len(x) >= FEW:
        return checked(x.T @ x / len(x), "the moments of what an expert is given", given.x_SH.dtype)
    return replace(given, gate_S=torch.ones_like(given.gate_S)).moment
