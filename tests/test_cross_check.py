"""Searched sets against the set of the lowest gate, by search tokens that they were not chosen on.

Letters: T tokens, E experts, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_scores import by_hand

from trimoe.calibration.gather import statistics
from trimoe.calibration.statistics import LayerStats
from trimoe.methods import ExpertDrop
from trimoe.methods.expert_drop import receptive_field, scores, search, stability
from trimoe.methods.expert_drop.options import Drop, Greedy, ReceptiveField
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.methods.lab import Lab
from trimoe.model.decision import unchanged
from trimoe.model.skeleton import Skeleton
from trimoe.output.record import Step
from trimoe.progress import QUIET
from trimoe.report.searched import section
from trimoe.show.format import runs
from trimoe.text.spec import CalibrationSpec


def test_each_half_is_judged_by_the_other() -> None:
    """The losses of two sets of halves as float64 sums over tokens' outputs, tokens weighed."""
    layer, gate_TE, y_TEH = by_hand()
    tokens, experts = gate_TE.shape
    weight_T = 1 + torch.arange(tokens) % 3
    layer.search["weight_T"] = weight_T.float()
    site: Any = type("Site", (), {"num_experts": experts, "rule": layer.rule, "layer": 0})
    step = ExpertDrop(count=2, counts="uniform", search=Greedy())
    found = stability.halves(step, site, layer, 2)
    assert found is not None
    lowest = tuple(sorted(scores.gate(layer).argsort()[:2].tolist()))
    assert found.lowest == lowest

    def lost(drop: tuple[int, ...], rows: slice) -> float:
        keep_E = torch.tensor([expert not in drop for expert in range(experts)])
        left_TE = layer.rule.dense(layer.search["logits_TE"], keep_E=keep_E).double()
        error_TH = torch.einsum("te,teh->th", gate_TE - left_TE, y_TEH)
        return float((error_TH.square().sum(1) * weight_T)[rows].sum())

    half = (slice(0, tokens // 2), slice(tokens // 2, tokens))
    for own, drop in zip(half, found.drops, strict=True):
        part = LayerStats(0, layer.rule, search={name: tensor[own] for name, tensor in layer.search.items()})
        assert drop == search.greedy(SubsetLoss(part), step.space(site, 2, ())).drops[0]
    full = float((torch.einsum("te,teh->th", gate_TE, y_TEH).square().sum(1) * weight_T).sum())
    crossed = lost(found.drops[0], half[1]) + lost(found.drops[1], half[0])
    assert found.loss == pytest.approx((crossed / full) ** 0.5, rel=1e-5)
    assert found.lowest_loss == pytest.approx((lost(lowest, slice(None)) / full) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("field", [None, ReceptiveField(k=2, t=1)])
def test_the_lowest_gate_goes_where_it_does_better(
    field: ReceptiveField | None, family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched on 16 tokens. A receptive field has it first among the sets that it tries."""
    skeleton = Skeleton.of(str(family_folder("qwen2_moe")))
    batches = [torch.randint(3, 96, (4, 64), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    tried: list[dict[int, list[Drop]]] = []

    def choose(skeleton: Skeleton, few: Any, menus: dict[int, list[Drop]], *_: Any, **__: Any) -> Any:
        tried.append(menus)
        return SimpleNamespace(drops={index: menu[0] for index, menu in menus.items()}, blocks=[])

    monkeypatch.setattr(receptive_field, "choose", choose)
    swapped: list[bool] = []
    for seed in range(4):
        options: dict[str, Any] = dict(count=3, counts="uniform", search=Greedy(), protect_super_experts=False, receptive_field=field)
        steps = ExpertDrop(**options, cross_check=False), ExpertDrop(**options)
        stats = statistics(skeleton, batches, reach=steps[0].reach(skeleton.sites), search_tokens=16, seed=seed)
        gone: list[dict[int, Drop]] = []
        for step in steps:
            as_it_is = unchanged(skeleton.sites)
            lab = Lab(skeleton, (step,), CalibrationSpec(), batches, seed, "cpu", {}, QUIET, decisions=as_it_is, given=stats)
            decided, metrics = step.decide(lab)
            gone.append({index: tuple(e for e in range(8) if e not in decision.keep) for index, decision in decided.items()})
        for index, layer in stats.layers.items():
            found = metrics["layers"][str(index)]["by_other_half"]
            lowest = tuple(sorted(scores.gate(layer).argsort()[:3].tolist()))
            worse = found["searched"] > found["gate"] and lowest != gone[0][index]
            assert gone[1][index] == (lowest if worse else gone[0][index])
            assert (index in metrics["gate_instead"]) == worse
            swapped.append(worse)
            row = metrics["layers"][str(index)]
            assert tuple(row["drop"]) == gone[1][index] and ("gate_loss" in row) == worse
            if worse:
                gone_E = torch.zeros(1, 8, dtype=torch.bool)
                gone_E[0, list(lowest)] = True
                assert row["gate_loss"] == pytest.approx(float(SubsetLoss(layer)(gone_E)[0])) and tuple(row["searched"]) == gone[0][index]
            if field is not None:
                assert tried[-1][index][0] == gone[1][index] and len(set(tried[-1][index])) == 2
        made = section(Step("expert_drop", {"search": {"greedy": {}}}, json.loads(json.dumps(metrics))))
        assert made is not None
        said = f"In layers {runs(sorted(metrics['gate_instead']))} the experts of the lowest gate went"
        assert (said in made.text) == bool(metrics["gate_instead"])
    assert any(swapped) and not all(swapped)
