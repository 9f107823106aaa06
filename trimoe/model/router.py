"""What a router computes, as a value: which experts a token goes to, and how much each one's output weighs.

T tokens, E experts, k chosen. A rule is found by running the real router on random inputs and taking the formula that reproduces
it, with all experts and with some of them deleted; nothing is read off a class name. A router that no formula reproduces is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Router = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
NEVER = float("-inf")


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """`score`: softmax over all experts, sigmoid of each, or sparsemixer (arXiv 2409.12136, top-2 picked one after the other).

    `renormalise`: the k weights are divided by their sum (softmax over the k chosen logits is the same thing). `groups` consecutive
    blocks of experts, of which a token may use `topk_group`; a group's score is its best expert ("max") or its two best ("top2").
    """

    score: Literal["softmax", "sigmoid", "sparsemixer"]
    top_k: int
    renormalise: bool = False
    groups: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2"] = "max"
    biased_choice: bool = False  # a correction bias that selects but does not weigh
    scale: float = 1.0
    jitter: float = 0.0  # sparsemixer's threshold

    @property
    def ordered(self) -> bool:
        """The chosen experts are simply the k best survivors of one fixed order per token.

        Not so with groups, with sparsemixer, and where a bias is added to softmax scores: those shift when experts go.
        """
        return self.groups == 1 and (self.score == "sigmoid" or (self.score == "softmax" and not self.biased_choice))

    @property
    def ordered_groups(self) -> bool:
        """Each group's chosen experts are its best survivors of one fixed order per token, with weights that need no other expert's score."""
        return self.groups > 1 and self.score == "sigmoid"

    @property
    def min_experts(self) -> int:
        """The fewest experts a layer can keep."""
        if self.groups == 1:
            return self.top_k
        in_group = max(2 if self.group_score == "top2" else 1, -(-self.top_k // self.topk_group))
        return in_group * self.groups

    def scores(self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None) -> torch.Tensor:
        """What an ordered rule chooses by, and one of ordered groups in a group, [T, E] (softmax is monotone, so the logits serve)."""
        assert self.ordered or self.ordered_groups
        if self.score == "softmax":
            return logits_TE
        return logits_TE.sigmoid() + bias_E if bias_E is not None and self.biased_choice else logits_TE.sigmoid()

    def route(self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None = None, keep_E: torch.Tensor | None = None):
        """(weights [T, k], indices [T, k]) when only the experts of `keep_E` (bool) exist; equals the router with the others' rows deleted.

        Leading dimensions broadcast: `keep_E` [P, 1, E] gives [P, T, k] for P sets of survivors.
        """
        keep = torch.ones(logits_TE.shape[-1], dtype=torch.bool, device=logits_TE.device) if keep_E is None else keep_E
        logits_TE, keep = torch.broadcast_tensors(logits_TE, keep)
        alive_TE = logits_TE.masked_fill(~keep, NEVER)
        if self.score == "sparsemixer":
            return self._sparsemixer(alive_TE)
        prob_TE = alive_TE.softmax(-1) if self.score == "softmax" else logits_TE.sigmoid()
        choice_TE = prob_TE if bias_E is None or not self.biased_choice else prob_TE + bias_E
        choice_TE = choice_TE.masked_fill(~keep, NEVER)
        if self.groups > 1:
            by_group = choice_TE.unflatten(-1, (self.groups, -1))
            group_TG = by_group.amax(-1) if self.group_score == "max" else by_group.topk(2, dim=-1)[0].sum(-1)
            allowed = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(-1, group_TG.topk(self.topk_group, dim=-1)[1], True)
            choice_TE = by_group.masked_fill(~allowed.unsqueeze(-1), NEVER).flatten(-2)
        indices_TK = choice_TE.topk(self.top_k, dim=-1)[1]
        weights_TK = prob_TE.gather(-1, indices_TK)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return weights_TK * self.scale, indices_TK

    def _sparsemixer(self, logits_TE: torch.Tensor):
        weights, indices, left_TE = [], [], logits_TE
        for _ in range(2):
            best, index = left_TE.max(-1, keepdim=True)
            far = ((best - logits_TE) / logits_TE.abs().clamp(min=best)) > 2 * self.jitter
            weights.append(left_TE.masked_fill(far, NEVER).softmax(-1).gather(-1, index))
            indices.append(index)
            left_TE = left_TE.scatter(-1, index, NEVER)
        return torch.cat(weights, -1) * self.scale, torch.cat(indices, -1)

    def dense(self, logits_TE: torch.Tensor, bias_E: torch.Tensor | None = None, keep_E: torch.Tensor | None = None) -> torch.Tensor:
        """The same weights spread over all experts, [T, E], zero where not chosen."""
        weights_TK, indices_TK = self.route(logits_TE, bias_E, keep_E)
        shape = (*weights_TK.shape[:-1], logits_TE.shape[-1])
        return weights_TK.new_zeros(shape).scatter_(-1, indices_TK, weights_TK)


def spread(weights_TK: torch.Tensor, indices_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[T, k] weights and indices as a dense [T, E]."""
    return torch.zeros(len(weights_TK), num_experts, dtype=weights_TK.dtype).scatter_(-1, indices_TK, weights_TK)


def identify(
    router: Router, pruned: Sequence[tuple[torch.Tensor, Router]], x_TH: torch.Tensor, bias_E: torch.Tensor | None, hints: dict[str, float]
) -> RoutingRule | None:
    """The formula that reproduces `router` on `x_TH` to 1e-5, and each of `pruned` (keep mask, the router with the other rows deleted).

    `hints` come from the configuration: n_group, topk_group, jitter. Returns None if no formula does.
    """
    logits, weights, indices = router(x_TH)
    top_k, num_experts = indices.shape[-1], logits.shape[-1]
    truth = spread(weights.float(), indices, num_experts)
    shapes = {(1, 1)} | {(int(hints.get("n_group") or 1), int(hints.get("topk_group") or 1))}
    options: Iterable[Any] = itertools.product(
        ("softmax", "sigmoid", "sparsemixer"), (True, False), (bias_E is not None, False), sorted(shapes, reverse=True), ("max", "top2")
    )
    for score, renormalise, biased, (groups, topk_group), group_score in options:
        rule = RoutingRule(
            score=score, top_k=top_k, renormalise=renormalise, biased_choice=biased, groups=groups, topk_group=topk_group,
            group_score=group_score, jitter=hints.get("jitter", 0.0),
        )  # fmt: skip
        if (groups > 1 and (num_experts % groups or num_experts // groups < 2)) or (score == "sparsemixer" and top_k != 2):
            continue
        mine = rule.dense(logits.float(), bias_E)
        scale = (truth.double().sum() / mine.double().sum()).item()
        if scale != scale or not torch.allclose(mine * scale, truth, rtol=1e-4, atol=1e-5):
            continue
        rule = RoutingRule(**{**rule.__dict__, "scale": float(f"{scale:.6g}")})
        if all(_same_pruned(rule, logits, bias_E, keep, other, x_TH) for keep, other in pruned):
            return rule
    return None


def _same_pruned(rule: RoutingRule, logits_TE, bias_E, keep_E, router: Router, x_TH) -> bool:
    small, weights, indices = router(x_TH)
    truth = spread(weights.float(), indices, small.shape[-1])
    return torch.allclose(rule.dense(logits_TE.float(), bias_E, keep_E)[:, keep_E], truth, rtol=1e-4, atol=1e-5)
