"""Importance scores against their formulas, and which experts are protected."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch

from trimoe.calibration.gather import statistics
from trimoe.calibration.statistics import LayerStats
from trimoe.methods.expert_drop import scores
from trimoe.model.router import RoutingRule
from trimoe.model.skeleton import Skeleton


def by_hand(num_experts: int = 6, tokens: int = 50, top_k: int = 2) -> tuple[LayerStats, torch.Tensor, torch.Tensor]:
    """(statistics, gates [T, E], outputs [T, E, H]) of a made-up layer."""
    generator = torch.Generator().manual_seed(3)
    layer = LayerStats(0, RoutingRule(score="softmax", top_k=top_k, renormalise=True))
    logits_TE = torch.randn(tokens, num_experts, generator=generator)
    y_TEH = torch.randn(tokens, num_experts, 7, generator=generator) + 0.7
    gate_TE = layer.rule.dense(logits_TE).double()
    y64, norm_TE = y_TEH.double(), y_TEH.double().norm(dim=-1)
    routed_TE, weighted_TEH = gate_TE > 0, gate_TE.unsqueeze(-1) * y_TEH.double()
    layer.add("tokens", tokens)
    layer.add("count_E", routed_TE.sum(0))
    layer.add("gate_sum_E", gate_TE.sum(0))
    layer.add("norm_sum_E", (norm_TE * routed_TE).sum(0))
    layer.add("gate_norm_sum_E", (norm_TE * gate_TE).sum(0))
    layer.add("energy_EE", torch.einsum("teh,tfh->ef", weighted_TEH, weighted_TEH))
    layer.add("weight_score_E", torch.rand(num_experts, generator=generator))
    order_TM = logits_TE.argsort(dim=1, descending=True)
    ordered_TMH = y_TEH.gather(1, order_TM.unsqueeze(-1).expand_as(y_TEH))
    layer.search |= dict(logits_TE=logits_TE, order_TM=order_TM, gram_TMM=ordered_TMH @ ordered_TMH.mT, weight_T=torch.ones(tokens))
    return layer, gate_TE, y64


def test_scores_are_their_formulas() -> None:
    layer, gate_TE, y_TEH = by_hand()
    tokens, experts = gate_TE.shape
    norm_TE = y_TEH.norm(dim=-1)
    for e in range(experts):
        mine = [t for t in range(tokens) if gate_TE[t, e] > 0]
        assert scores.frequency(layer)[e] == len(mine) > 0
        assert float(scores.gate(layer)[e]) == pytest.approx(sum(float(gate_TE[t, e]) for t in mine) / tokens)
        assert float(scores.output_norm(layer)[e]) == pytest.approx(sum(float(norm_TE[t, e]) for t in mine))
        assert float(scores.reap(layer)[e]) == pytest.approx(sum(float(gate_TE[t, e] * norm_TE[t, e]) for t in mine) / len(mine))
        keep = torch.arange(experts) != e
        left_TE = layer.rule.dense(layer.search["logits_TE"], keep_E=keep).double()
        full_TH, without_TH = torch.einsum("te,teh->th", gate_TE, y_TEH), torch.einsum("te,teh->th", left_TE, y_TEH)
        assert float(scores.leave_one_out(layer)[e]) == pytest.approx(float((full_TH - without_TH).norm() / full_TH.norm()), rel=1e-5)
    assert torch.equal(scores.weights(layer), layer["weight_score_E"])
    assert set(scores.SCORES) == {"leave_one_out", "reap", "gate", "frequency", "output_norm", "coactivation", "weights"}


def test_coactivation_is_the_greedy_minimum() -> None:
    layer, gate_TE, y_TEH = by_hand()
    gone: list[int] = []
    for _ in range(6):  # drop what makes the dropped experts' joint output smallest
        cost = {e: float((gate_TE[:, [*gone, e], None] * y_TEH[:, [*gone, e]]).sum(1).square().sum()) for e in range(6) if e not in gone}
        gone.append(min(cost, key=cost.__getitem__))
    assert scores.coactivation(layer).argsort().tolist() == gone != layer["energy_EE"].diagonal().argsort().tolist()


def test_super_experts_are_found_where_they_were_planted(tmp_path: Path) -> None:
    model = families.build("mixtral")
    with torch.no_grad():
        model.state_dict()["model.layers.2.mlp.experts.down_proj"][3] *= 1000
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
    assert scores.super_experts(statistics(Skeleton.of(str(tmp_path)), [ids]).layers) == {0: (), 1: (), 2: (3,)}


def test_super_experts_need_both_conditions() -> None:
    rule = RoutingRule(score="softmax", top_k=2)
    layers = {index: LayerStats(index, rule) for index in (0, 4)}
    for index, layer in layers.items():
        layer.add("max_abs_E", torch.linspace(1, 2, 500) + index * 1e-4)
    layers[0].sums["max_abs_E"][7] = 100.0
    layers[4].sums["max_abs_E"][[1, 2]] = torch.tensor([11.0, 9.0], dtype=torch.float64)
    assert scores.super_experts(layers) == {0: (7,), 4: (1,)}, "9 is above the quantile and below a tenth of the maximum"
    layers[0].sums["max_abs_E"][10:14] = 50.0
    layers[4].sums["max_abs_E"][10:14] = 60.0
    assert scores.super_experts(layers) == {0: (7,), 4: (10, 11, 12, 13)}, "50 is above a tenth of the maximum and below the quantile"
    assert scores.super_experts({}) == {}
