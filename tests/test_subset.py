"""The exact subset loss against what it stands for: the real MoE block with experts masked and deleted; and against float64.

Letters: T tokens, P candidates, E experts, M experts in reach, H hidden size, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn

from trimoe.calibration.gather import statistics
from trimoe.calibration.observer import reach_order
from trimoe.calibration.search_tokens import MEAN, USUAL, gram_side, search_budget
from trimoe.calibration.statistics import LayerStats
from trimoe.errors import UserError
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.model.moe_block import MoeBlock, keep_experts
from trimoe.model.router import RoutingRule, identify
from trimoe.model.skeleton import Skeleton
from trimoe.walk.decided import masked

ALL = sorted(families.FAMILIES)
RULES: dict[str, RoutingRule] = {
    "softmax": RoutingRule(score="softmax", top_k=2),
    "softmax8": RoutingRule(score="softmax", top_k=8, scale=1.5),
    "renormalised": RoutingRule(score="softmax", top_k=8, renormalise=True),
    "renormalised1": RoutingRule(score="softmax", top_k=1, renormalise=True),
    "sigmoid": RoutingRule(score="sigmoid", top_k=4),
    "sigmoid-bias": RoutingRule(score="sigmoid", top_k=8, renormalise=True, biased_choice=True, scale=2.5),
    "groups-max": RoutingRule(score="softmax", top_k=3, groups=4, topk_group=2, scale=1.5),
    "groups-top2": RoutingRule(
        score="sigmoid", top_k=4, renormalise=True, groups=4, topk_group=2, group_score="top2", biased_choice=True, scale=2.5
    ),
    "sparsemixer": RoutingRule(score="sparsemixer", top_k=2, jitter=0.01),
    "softmax-bias": RoutingRule(score="softmax", top_k=4, renormalise=True, biased_choice=True),
}


def token_batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 96, (3, 16), generator=generator) for _ in range(2)]


def random_drops(rule: RoutingRule, num_experts: int, sizes: list[int], each: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Valid sets: equally many from every router group."""
    generator, per_group, drops = torch.Generator().manual_seed(seed), num_experts // rule.groups, []
    for size in sizes:
        assert size % rule.groups == 0 and num_experts - size >= rule.min_experts
        for _ in range(each):
            parts = [torch.randperm(per_group, generator=generator)[: size // rule.groups] + g * per_group for g in range(rule.groups)]
            drops.append(tuple(sorted(torch.cat(parts).tolist())))
    return drops


def as_mask(drops: list[tuple[int, ...]], num_experts: int) -> torch.Tensor:
    mask_PE = torch.zeros(len(drops), num_experts, dtype=torch.bool)
    for row, drop in zip(mask_PE, drops, strict=True):
        row[list(drop)] = True
    return mask_PE


def valid_sizes(rule: RoutingRule, num_experts: int) -> list[int]:
    return list(range(rule.groups, num_experts - rule.min_experts + 1, rule.groups))


# ---- the real block


class Block:
    """One MoE block of the in-memory model and the inputs it was given; `run` gives the routed experts' output in float64."""

    def __init__(self, layer: nn.Module, site: MoeBlock, x_TH: torch.Tensor):
        self.layer, self.site, self.x = layer, site, x_TH

    @torch.no_grad()
    def run(self, layer: nn.Module | None = None) -> torch.Tensor:
        layer, seen = layer or self.layer, []
        handle = self.site.experts_of(layer).register_forward_hook(lambda module, args, output: seen.append(output))
        self.site.block_of(layer)(self.x)
        handle.remove()
        return seen[0].double()

    def masked(self, drop: tuple[int, ...]) -> torch.Tensor:
        with masked(self.layer, self.site, drop):
            return self.run()

    def deleted(self, drop: tuple[int, ...]) -> torch.Tensor:
        layer = deepcopy(self.layer)
        keep_experts(self.site.block_of(layer), self.site, tuple(e for e in range(self.site.num_experts) if e not in drop))
        return self.run(layer)


def real_blocks(family: str, skeleton: Skeleton) -> dict[int, Block]:
    model = families.build(family)
    layers, given = model.get_submodule(skeleton.prefix), {index: [] for index in skeleton.sites}
    handles = [
        site.block_of(layers[index]).register_forward_pre_hook(lambda module, args, index=index: given[index].append(args[0]))
        for index, site in skeleton.sites.items()
    ]
    with torch.no_grad():
        for batch in token_batches():
            model(batch)
    for handle in handles:
        handle.remove()
    return {index: Block(layers[index], site, torch.cat(given[index])) for index, site in skeleton.sites.items()}


@pytest.mark.parametrize("family", ALL)
def test_loss_is_what_masking_and_deleting_do(family: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    stats = statistics(skeleton, token_batches(), reach=8, search_tokens=10_000)
    for index, block in real_blocks(family, skeleton).items():
        site, loss = skeleton.sites[index], SubsetLoss(stats.layers[index])
        assert loss.max_drop == 8 - site.rule.min_experts
        drops = random_drops(site.rule, 8, valid_sizes(site.rule, 8), 4, seed=index)
        full_TH = block.run()
        norm = float(full_TH.norm())
        assert loss.norm == pytest.approx(norm, rel=1e-5)
        got = loss(as_mask([(), *drops], 8)).tolist()
        assert got[0] < 1e-6
        for drop, value in zip(drops, got[1:], strict=True):
            by_mask, by_deleting = block.masked(drop), block.deleted(drop)
            torch.testing.assert_close(by_mask, by_deleting, rtol=1e-4, atol=1e-6 * norm)
            assert float((full_TH - by_deleting).norm()) / norm == pytest.approx(value, rel=1e-5, abs=1e-6), drop
        assert sum(value > 1e-2 for value in got[1:]) > len(drops) / 2, "losses near zero would prove nothing"
        assert SubsetLoss(stats.layers[index]).norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("family", ALL)
def test_rule_with_survivors_is_the_router_with_rows_deleted(family: str, family_folder: Callable[[str], Path]) -> None:
    skeleton = Skeleton.of(str(family_folder(family)))
    for block in real_blocks(family, skeleton).values():
        site, seen = block.site, []
        x_TH = block.x.reshape(-1, block.x.shape[-1])
        site.router_of(block.layer).register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        block.run()
        logits_TE, bias_E = seen[0][0].float(), site.bias_of(block.layer)
        for drop in random_drops(site.rule, 8, valid_sizes(site.rule, 8), 3, seed=7):
            seen.clear()
            block.deleted(drop)
            small, weights_TK, indices_TK = seen[0]
            keep = torch.tensor([e for e in range(8) if e not in drop])
            truth_TE = torch.zeros(len(x_TH), 8).scatter_(1, keep[indices_TK], weights_TK)
            torch.testing.assert_close(small.float(), logits_TE[:, keep], rtol=1e-4, atol=1e-5)
            mask_E = torch.zeros(8, dtype=torch.bool)
            mask_E[keep] = True
            torch.testing.assert_close(site.rule.dense(logits_TE, bias_E, mask_E), truth_TE, rtol=1e-4, atol=1e-6)


# ---- large routers, by hand


def layer_of(rule: RoutingRule, logits_TE: torch.Tensor, y_TEH: torch.Tensor, bias_E: torch.Tensor | None, reach: int) -> LayerStats:
    layer = LayerStats(0, rule, bias_E=bias_E)
    order_TM = reach_order(rule, logits_TE, bias_E, reach)
    y_TMH = y_TEH.gather(1, order_TM.unsqueeze(-1).expand(-1, -1, y_TEH.shape[-1]))
    layer.search |= dict(logits_TE=logits_TE, order_TM=order_TM, gram_TMM=y_TMH @ y_TMH.mT, weight_T=torch.ones(len(order_TM)))
    return layer


def direct(
    rule: RoutingRule, logits_TE: torch.Tensor, y_TEH: torch.Tensor, bias_E: torch.Tensor | None, mask_PE: torch.Tensor
) -> list[float]:
    """||F(X) - F(X; E minus P)|| / ||F(X)|| in float64, one candidate after the other."""
    logits, bias, y = logits_TE.double(), None if bias_E is None else bias_E.double(), y_TEH.double()
    full_TH = torch.einsum("te,teh->th", rule.dense(logits, bias), y)
    left = [torch.einsum("te,teh->th", rule.dense(logits, bias, ~drop), y) for drop in mask_PE]
    return [float((full_TH - out).norm() / full_TH.norm()) for out in left]


def made_up(rule: RoutingRule, num_experts: int, tokens: int = 24, spread: float = 2.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(num_experts)
    logits_TE = torch.randn(tokens, num_experts, generator=generator) * spread
    logits_TE[0] = torch.randn(num_experts, generator=generator) * 1e-4  # nearly no preference
    logits_TE[1] = 0.3 + torch.arange(num_experts).flip(0) * 1e-6
    y_TEH = torch.randn(tokens, num_experts, 8, generator=generator) + 0.5
    bias_E = 0.2 * torch.randn(num_experts, generator=generator) if rule.biased_choice else None
    return logits_TE, y_TEH, bias_E


@pytest.mark.parametrize("num_experts", [16, 64, 512])
@pytest.mark.parametrize("name", RULES)
def test_large_routers(name: str, num_experts: int) -> None:
    rule = RULES[name]
    logits_TE, y_TEH, bias_E = made_up(rule, num_experts, tokens=24 if num_experts < 512 else 8)
    loss = SubsetLoss(layer_of(rule, logits_TE, y_TEH, bias_E, num_experts))
    assert loss.max_drop == num_experts - rule.min_experts
    step = rule.groups
    sizes = sorted({step, num_experts // 4 // step * step, num_experts // 2 // step * step, loss.max_drop // step * step})
    mask_PE = as_mask(random_drops(rule, num_experts, sizes, 3), num_experts)
    got = loss(mask_PE)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(direct(rule, logits_TE, y_TEH, bias_E, mask_PE), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("reach", [9, 12, 20, 40])
@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.ordered])
def test_short_reach_is_exact_up_to_its_limit(name: str, reach: int) -> None:
    rule, num_experts = RULES[name], 64
    logits_TE, y_TEH, bias_E = made_up(rule, num_experts)
    layer = layer_of(rule, logits_TE, y_TEH, bias_E, reach)
    assert layer.search["gram_TMM"].shape[1:] == (reach, reach)
    loss = SubsetLoss(layer)
    assert loss.max_drop == reach - rule.top_k
    # the hardest sets: exactly a token's best experts, so that its survivors lie at the end of the reach
    hardest = [tuple(row.tolist()) for row in layer.search["order_TM"][:, : loss.max_drop]]
    mask_PE = as_mask([*random_drops(rule, num_experts, [1, loss.max_drop], 3), *hardest], num_experts)
    assert loss(mask_PE).tolist() == pytest.approx(direct(rule, logits_TE, y_TEH, bias_E, mask_PE), rel=1e-5, abs=1e-6)
    with pytest.raises(AssertionError, match="the Gram reaches"):
        loss(as_mask([tuple(range(loss.max_drop + 1))], num_experts))


@pytest.mark.parametrize("dropped", [4, 16, 32])
def test_the_first_of_every_group_are_enough(dropped: int, family_folder: Callable[[str], Path]) -> None:
    """Also where a token's best experts of each group go, and where logits tie."""
    rule, num_experts = RULES["groups-top2"], 64
    site = replace(next(iter(Skeleton.of(str(family_folder("mixtral"))).sites.values())), rule=rule, num_experts=num_experts)
    side = gram_side(site, rule.top_k + dropped)
    assert side == 4 * (4 + dropped // 4) < num_experts
    logits_TE, y_TEH, bias_E = made_up(rule, num_experts)
    layer = layer_of(rule, logits_TE, y_TEH, bias_E, side)
    loss = SubsetLoss(layer)
    assert loss.max_drop == dropped
    first = layer.search["order_TM"].unflatten(1, (4, -1))[:, :, : dropped // 4].flatten(1)
    mask_PE = as_mask([*random_drops(rule, num_experts, [4, dropped], 3), *map(tuple, first.tolist())], num_experts)
    assert loss(mask_PE).tolist() == pytest.approx(direct(rule, logits_TE, y_TEH, bias_E, mask_PE), rel=1e-5, abs=1e-6)
    with pytest.raises(AssertionError, match="the Gram reaches"):
        loss(as_mask([tuple(range(dropped + 1))], num_experts))
    tied = SubsetLoss(layer_of(rule, (logits_TE * 4).round() / 4, y_TEH, torch.zeros(num_experts), side))
    assert float(tied(torch.zeros(1, num_experts, dtype=torch.bool))) < 1e-6


@pytest.mark.parametrize("name", ["renormalised", "softmax", "sigmoid-bias", "groups-top2", "sparsemixer"])
def test_candidates_do_not_see_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[name]
    logits_TE, y_TEH, bias_E = made_up(rule, 64)
    loss = SubsetLoss(layer_of(rule, logits_TE, y_TEH, bias_E, 64))
    mask_PE = as_mask(random_drops(rule, 64, [rule.groups, 16, 32], 100), 64)
    assert len(mask_PE) == 300
    many = loss(mask_PE)
    one = torch.cat([loss(row.unsqueeze(0)) for row in mask_PE])
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-7)
    monkeypatch.setattr("trimoe.methods.expert_drop.subset.CHUNK", 1 << 12)
    torch.testing.assert_close(loss(mask_PE), many, rtol=1e-6, atol=1e-7)
    assert loss(mask_PE[:0]).shape == (0,)


@pytest.mark.parametrize("name", [name for name in RULES if name != "renormalised1"])
def test_confident_routers(name: str) -> None:
    """Logits tens apart: what is left after the favourite is gone has a probability near zero beside it."""
    rule = RULES[name]
    logits_TE, y_TEH, bias_E = made_up(rule, 16, spread=25.0 if rule.score == "softmax" else 4.0)
    loss = SubsetLoss(layer_of(rule, logits_TE, y_TEH, bias_E, 16))
    mask_PE = as_mask(random_drops(rule, 16, [rule.groups, 8 // rule.groups * rule.groups], 8), 16)
    assert loss(mask_PE).tolist() == pytest.approx(direct(rule, logits_TE, y_TEH, bias_E, mask_PE), rel=1e-5, abs=1e-6)


def test_what_is_left_beside_an_overwhelming_favourite() -> None:
    """Without renormalisation the survivors' softmax is taken anew; their probabilities beside the favourite underflow."""
    rule, generator = RULES["softmax"], torch.Generator().manual_seed(0)
    logits_TE = torch.tensor([[60.0, 0.0, 1.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
    y_TEH, mask_PE = torch.randn(2, 4, 8, generator=generator), as_mask([(0,)], 4)
    for favourite in (60.0, 95.0):
        logits_TE[0, 0] = favourite
        loss = SubsetLoss(layer_of(rule, logits_TE, y_TEH, None, 4))
        assert loss(mask_PE).tolist() == pytest.approx(direct(rule, logits_TE, y_TEH, None, mask_PE), rel=1e-5), favourite


@pytest.mark.parametrize("name", RULES)
def test_nothing_dropped_costs_nothing_even_with_ties(name: str) -> None:
    """Logits computed in bfloat16 tie often; whichever of two equal experts is taken, it is the same one before and after."""
    rule, generator = RULES[name], torch.Generator().manual_seed(1)
    logits_TE = torch.randn(400, 64, generator=generator).bfloat16().float()
    loss = SubsetLoss(layer_of(rule, logits_TE, torch.randn(400, 64, 8, generator=generator), None, 24))
    assert float(loss(torch.zeros(1, 64, dtype=torch.bool))) < 1e-6


@pytest.mark.parametrize("name", ["renormalised", "softmax", "sigmoid-bias", "groups-top2", "sparsemixer"])
def test_a_token_of_weight_three_is_three_tokens(name: str) -> None:
    rule = RULES[name]
    logits_TE, y_TEH, bias_E = made_up(rule, 64)
    few, weight_T = layer_of(rule, logits_TE, y_TEH, bias_E, 64), torch.arange(24) % 4
    few.search["weight_T"] = weight_T.float()
    many_T = torch.arange(24).repeat_interleave(weight_T)
    many = layer_of(rule, logits_TE[many_T], y_TEH[many_T], bias_E, 64)
    mask_PE = as_mask(random_drops(rule, 64, [rule.groups, 16, 32], 3), 64)
    torch.testing.assert_close(SubsetLoss(few)(mask_PE), SubsetLoss(many)(mask_PE), rtol=1e-5, atol=1e-6)
    assert SubsetLoss(few).norm == pytest.approx(SubsetLoss(many).norm, rel=1e-5)


# ---- how many search tokens


def test_search_budget_keeps_to_its_memory(family_folder: Callable[[str], Path]) -> None:
    sites = list(Skeleton.of(str(family_folder("mixtral"))).sites.values())
    grouped = [replace(site, rule=RULES["groups-max"]) for site in sites]
    assert search_budget(sites, 8, 5000, 2.0) == 5000
    each = 4 * 8 * 8  # of one layer, float32; the others' are not in memory
    assert search_budget(sites, 8, 10**9, 1.0) == 2**30 // each
    assert search_budget(sites, 4, 10**9, 1.0) == 2**30 // (each // 4)
    assert search_budget(grouped, 4, 10**9, 1.0) == 2**30 // each, "softmax over all groups needs them all, whatever the reach"
    assert search_budget(sites, 99, 10**9, 1.0) == 2**30 // each
    assert search_budget(sites, 0, 1000, 1.0) == 0
    assert search_budget(sites, 8, None, 2.0) == USUAL
    many = [replace(site, num_experts=512, rule=replace(site.rule, top_k=2)) for site in sites]
    assert search_budget(many, 8, None, 2.0) == MEAN * 256, "every expert has so many on average"
    with pytest.raises(UserError, match="set calibration"):
        search_budget(sites, 8, 1000, 1e-9)


# ---- finding the rule


def router_of(
    rule: RoutingRule, weight_EH: torch.Tensor, bias_E: torch.Tensor | None
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def run(x_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits_TE = x_TH @ weight_EH.T
        return logits_TE, *rule.route(logits_TE, bias_E)

    return run


def identified(rule: RoutingRule, change: Callable[[Any], Any] = lambda router: router) -> RoutingRule | None:
    generator = torch.Generator().manual_seed(2)
    weight_EH, bias_E = torch.randn(16, 24, generator=generator) * 0.4, 0.2 * torch.randn(16, generator=generator)
    x_TH, keep_E = torch.randn(96, 24, generator=generator), torch.ones(16, dtype=torch.bool)
    keep_E[[1, 6, 8, 15]] = False
    bias = bias_E if rule.biased_choice else None
    small = router_of(rule, weight_EH[keep_E], bias[keep_E] if bias is not None else None)
    hints = {"n_group": rule.groups, "topk_group": rule.topk_group, "jitter": rule.jitter}
    return identify(change(router_of(rule, weight_EH, bias)), [(keep_E, change(small))], x_TH, bias, hints)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_found_again(name: str) -> None:
    rule = RULES[name]
    found = identified(rule)
    assert found is not None
    neutral = {"renormalise": rule.renormalise} if rule.score == "sparsemixer" else {}
    assert replace(found, **neutral) == rule


@pytest.mark.parametrize("name", RULES)
def test_other_routers_are_refused(name: str) -> None:
    def squared(router: Any) -> Any:
        return lambda x_TH: (lambda logits, weights, index: (logits, weights.square(), index))(*router(x_TH))

    def worst_first(router: Any) -> Any:
        return lambda x_TH: (lambda logits, weights, index: (logits, weights, 7 - index % 8))(*router(x_TH))

    assert identified(RULES[name], squared) is None or RULES[name].top_k == 1
    assert identified(RULES[name], worst_first) is None


def test_a_rule_that_only_fits_the_whole_router_is_refused() -> None:
    """Pruned by zeroing probabilities instead of deleting rows: the full router looks the same."""
    rule, generator = RULES["softmax"], torch.Generator().manual_seed(0)
    weight_EH, x_TH = torch.randn(16, 24, generator=generator) * 0.4, torch.randn(96, 24, generator=generator)
    keep_E, whole = torch.arange(16) < 12, router_of(rule, weight_EH, None)

    def frozen(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x @ weight_EH[:12].T, *(x @ weight_EH.T).softmax(1)[:, :12].topk(2, dim=1)

    assert identify(whole, [(keep_E, router_of(rule, weight_EH[:12], None))], x_TH, None, {}) is not None
    assert identify(whole, [(keep_E, frozen)], x_TH, None, {}) is None
