"""Rounding, clipping, GPTQ and AWQ against slow references in float64, and whole layers of quantised experts.

Letters: O outputs, I inputs, G groups, T tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trimoe.checkpoint.packed import Packed
from trimoe.errors import UserError
from trimoe.methods.quantize.quantize import Quantize, folded, linear_rows, put_back
from trimoe.methods.quantize.rounding import ALPHAS, DAMP, SHRINK, awq_scale, clipped, common_group, gptq, rounded, weighted_error
from trimoe.model.decision import LayerDecision, unchanged
from trimoe.model.expert import matrices, run_expert
from trimoe.model.moe_block import MoeBlock
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import first_projection
from trimoe.walk.expert_inputs import LayerInputs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METHODS = ["gptq", "awq", "round"]


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_moment(inputs: int, seed: int, tokens: int = 600) -> torch.Tensor:
    """The second moment of inputs that share a few directions and differ in size by some ten times."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1) ** -0.5
    size = torch.exp(0.8 * torch.randn(inputs, generator=generator))
    x_TI = (torch.randn(tokens, inputs, generator=generator) @ mix.T) * size
    return (x_TI.T @ x_TI).double() / tokens


def assert_sound(packed: Packed, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype) -> None:
    assert packed.q_OI.dtype == torch.int8 and packed.q_OI.shape == (rows, columns) and packed.q_OI.is_contiguous()
    assert packed.scale_OG.dtype == dtype and packed.scale_OG.shape == (rows, columns // group)
    assert (packed.bits, packed.group) == (bits, group)
    assert int(packed.q_OI.min()) >= -(2 ** (bits - 1)) and int(packed.q_OI.max()) < 2 ** (bits - 1)
    assert bool((packed.scale_OG > 0).all()) and bool(packed.scale_OG.isfinite().all())


def nearest(value: float, scale: float, bits: int) -> int:
    return min(max(round(value / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)


# ---- rounding


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=5), st.integers(1, 400))
def test_common_group_is_the_largest(widths: list[int], wanted: int) -> None:
    assert common_group(widths, wanted) == max(g for g in range(1, wanted + 1) if all(width % g == 0 for width in widths))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 4), groups=st.integers(1, 3), group=st.sampled_from([8, 12, 32]), bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES), size=st.floats(1e-3, 10), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rounded_is_the_loop(rows: int, groups: int, group: int, bits: int, dtype: torch.dtype, size: float, seed: int) -> None:
    w_OI = size * torch.randn(rows, groups * group, generator=torch.Generator().manual_seed(seed))
    packed = rounded(w_OI, bits, group, dtype)
    assert_sound(packed, rows, groups * group, bits, group, dtype)
    for o in range(rows):
        for g in range(groups):
            values = w_OI[o, g * group : (g + 1) * group].double().tolist()
            scale = float(packed.scale_OG[o, g])
            assert scale == pytest.approx(max(map(abs, values)) / (2 ** (bits - 1) - 0.5), rel=2 * torch.finfo(dtype).eps, abs=6e-8)
            for value, q in zip(values, packed.q_OI[o, g * group : (g + 1) * group].tolist(), strict=True):
                # The largest magnitude lies half a step past an integer, where two are equally good.
                assert abs(value - q * scale) <= abs(value - nearest(value, scale, bits) * scale) * (1 + 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-12, 60000.0])
def test_scales_stay_positive_and_finite(value: float, bits: int, dtype: torch.dtype) -> None:
    w_OI = torch.full((3, 16), value)
    w_OI[1, :8] = 0
    moment = torch.eye(16, dtype=torch.float64)
    for packed in (rounded(w_OI, bits, 8, dtype), clipped(w_OI, moment, bits, 8, dtype), gptq(w_OI, moment, bits, 8, dtype)):
        assert_sound(packed, 3, 16, bits, 8, dtype)
        dense = packed.dense(torch.float32)
        assert bool(dense.isfinite().all()) and not dense[1, :8].any()
        if value == 60000.0:
            assert dense[0].tolist() == pytest.approx(w_OI[0].tolist(), rel=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_weighted_error_is_the_outputs_mean_square(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x_TI = torch.randn(50, 24, generator=generator)
    w_OI, other_OI = weights(6, 24, 0), rounded(weights(6, 24, 0), bits, 8, torch.float32).dense()
    expected = (x_TI @ (w_OI - other_OI).T).square().sum() / len(x_TI)
    assert float(weighted_error(w_OI, other_OI, (x_TI.T @ x_TI).double() / len(x_TI))) == pytest.approx(float(expected), rel=1e-4)


# ---- clipping


def reference_clip(w_OI: torch.Tensor, weight_I: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """float32 scales by trying every factor on every group, one number after the other."""
    scale_OG = torch.empty(w_OI.shape[0], w_OI.shape[1] // group)
    for o in range(scale_OG.shape[0]):
        for g in range(scale_OG.shape[1]):
            part = slice(g * group, (g + 1) * group)
            values, weight = w_OI[o, part].tolist(), weight_I[part].tolist()
            tried = []
            for factor in SHRINK:
                scale = float(torch.tensor(max(map(abs, values)) * factor / (2 ** (bits - 1) - 0.5)))
                tried.append((sum(u * (v - scale * nearest(v, scale, bits)) ** 2 for u, v in zip(weight, values, strict=True)), scale))
            scale_OG[o, g] = min(tried)[1]
    return scale_OG


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", [0, 1])
def test_clipped_takes_the_best_factor(bits: int, seed: int) -> None:
    w_OI, moment = weights(5, 48, seed), correlated_moment(48, seed)
    packed = clipped(w_OI, moment, bits, 16, torch.float32)
    torch.testing.assert_close(packed.scale_OG, reference_clip(w_OI, moment.diagonal(), bits, 16), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_clipping_never_loses(bits: int, dtype: torch.dtype) -> None:
    w_OI, moment = weights(16, 64, 2), correlated_moment(64, 2)
    diagonal = torch.diag(moment.diagonal())
    packed, plain = clipped(w_OI, moment, bits, 32, dtype), rounded(w_OI, bits, 32, dtype)
    assert_sound(packed, 16, 64, bits, 32, dtype)
    assert float(weighted_error(w_OI, packed.dense(), diagonal)) <= float(weighted_error(w_OI, plain.dense(), diagonal)) * (1 + 1e-6)


# ---- GPTQ


def reference_gptq(w_OI: torch.Tensor, moment: torch.Tensor, scale_OG: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers, each input's own share of variance) by Gaussian elimination on the whole inverse, one column after the other, float64."""
    w_OI, group = w_OI.double().clone(), w_OI.shape[1] // scale_OG.shape[1]
    damping = DAMP * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    inverse = torch.linalg.inv(moment + damping)
    q_OI, own_I = torch.zeros(w_OI.shape, dtype=torch.int8), torch.zeros(len(moment), dtype=torch.float64)
    for i in moment.diagonal().argsort(descending=True, stable=True).tolist():
        scale_O = scale_OG[:, i // group].double()
        q_O = (w_OI[:, i] / scale_O).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q_OI[:, i] = q_O.to(torch.int8)
        stored_O = (q_O * scale_O).to(scale_OG.dtype).double()
        own_I[i] = 1 / inverse[i, i]
        w_OI -= torch.outer(w_OI[:, i] - stored_O, inverse[i] / inverse[i, i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q_OI, own_I


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(48, 16), (320, 32)])
def test_gptq_is_the_elimination(inputs: int, group: int, bits: int, dtype: torch.dtype) -> None:
    w_OI, moment = weights(8, inputs, 4), correlated_moment(inputs, 4)
    packed = gptq(w_OI, moment, bits, group, dtype)
    assert_sound(packed, 8, inputs, bits, group, dtype)
    q_OI, own_I = reference_gptq(w_OI, moment, packed.scale_OG, bits)
    assert torch.equal(packed.q_OI, q_OI)
    if dtype == torch.float32:
        torch.testing.assert_close(packed.scale_OG, reference_clip(w_OI, own_I, bits, group), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, seed: int) -> None:
    w_OI, moment = weights(32, 96, seed), correlated_moment(96, seed)
    own, plain = (float(weighted_error(w_OI, packed.dense(), moment)) for packed in (
        gptq(w_OI, moment, bits, 32, torch.float32), rounded(w_OI, bits, 32, torch.float32),
    ))  # fmt: skip
    assert own < 0.5 * plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_with_independent_inputs_is_rounding(bits: int, dtype: torch.dtype) -> None:
    w_OI, moment = weights(8, 160, 5), torch.eye(160, dtype=torch.float64)
    solved, plain = gptq(w_OI, moment, bits, 32, dtype), clipped(w_OI, moment, bits, 32, dtype)
    assert torch.equal(solved.q_OI, plain.q_OI) and torch.equal(solved.scale_OG, plain.scale_OG)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_gptq_does_not_depend_on_the_inputs_unit(size: float) -> None:
    w_OI, moment = weights(6, 64, 6), correlated_moment(64, 6)
    assert torch.equal(gptq(w_OI, size * moment, 4, 16, torch.float32).q_OI, gptq(w_OI, moment, 4, 16, torch.float32).q_OI)


def test_gptq_with_dead_inputs_rounds_them() -> None:
    w_OI, moment = weights(6, 64, 7), correlated_moment(64, 7)
    dead = [3, 17, 40]
    moment[dead] = 0
    moment[:, dead] = 0
    packed = gptq(w_OI, moment, 4, 16, torch.float32)
    for i in dead:
        assert packed.q_OI[:, i].tolist() == [nearest(float(w_OI[o, i]), float(packed.scale_OG[o, i // 16]), 4) for o in range(len(w_OI))]
    nothing = gptq(w_OI, torch.zeros_like(moment), 4, 16, torch.float32)
    assert torch.equal(nothing.q_OI, clipped(w_OI, torch.eye(64), 4, 16, torch.float32).q_OI)


def test_gptq_with_fewer_tokens_than_inputs_and_one_giant_input() -> None:
    w_OI, moment = weights(6, 128, 8), correlated_moment(128, 8, tokens=5)
    moment[9] *= 1e4
    moment[:, 9] *= 1e4
    packed = gptq(w_OI, moment, 4, 32, torch.bfloat16)
    assert_sound(packed, 6, 128, 4, 32, torch.bfloat16)
    assert torch.isfinite(weighted_error(w_OI, packed.dense(), moment))


# ---- AWQ


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_awq_scale_is_the_best_of_the_grid(bits: int, seed: int) -> None:
    w_OI, moment = weights(12, 48, seed), correlated_moment(48, seed)

    def error(s_I: torch.Tensor) -> float:
        back = rounded(w_OI * s_I, bits, 16, torch.bfloat16).dense().double() / s_I.double()
        difference = w_OI.double() - back
        return float(torch.trace(difference @ moment @ difference.T))

    rms_I = moment.diagonal().sqrt() / moment.diagonal().sqrt().mean()
    tried = []
    for alpha in ALPHAS:
        s_I = rms_I**alpha
        tried.append(error((s_I / math.sqrt(float(s_I.max() * s_I.min()))).float()))
    s_I = awq_scale(w_OI, moment, bits, 16, torch.bfloat16)
    assert s_I.shape == (48,) and bool((s_I > 0).all())
    assert error(s_I) == pytest.approx(min(tried), rel=1e-2)
    assert error(s_I) <= tried[0] * (1 + 1e-4)  # alpha 0 is no scale
    assert min(tried) < 0.95 * tried[0]


def test_awq_scale_survives_inputs_that_never_fire() -> None:
    w_OI = weights(4, 16, 0)
    assert torch.equal(awq_scale(w_OI, torch.zeros(16, 16), 4, 8, torch.float32), torch.ones(16))
    moment = torch.diag(torch.arange(16).double())
    assert bool(awq_scale(w_OI, moment, 4, 8, torch.float32).isfinite().all())


# ---- experts


def layer_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, MoeBlock, Skeleton]:
    """(experts, site, skeleton) of the first MoE layer."""
    skeleton = Skeleton.of(str(folder))
    index, site = next(iter(skeleton.sites.items()))
    return site.experts_of(families.build(family, dtype=dtype).get_submodule(skeleton.prefix)[index]), site, skeleton


def seen_of(site: MoeBlock, dtype: torch.dtype = torch.float32) -> LayerInputs:
    """1200 tokens, top 2 of all experts but the last two: the last gets none, the one before it 40."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(site.hidden, site.hidden, generator=generator) / site.hidden**0.5
    x_TH = torch.randn(1200, site.hidden, generator=generator) @ mix
    index_TK = torch.rand(1200, site.num_experts - 2, generator=generator).topk(2)[1]
    index_TK[:40, 0] = site.num_experts - 2
    return LayerInputs(x_TH.to(dtype), index_TK, torch.rand(1200, 2, generator=generator).to(dtype))


def output_errors(experts: Any, other: Any, site: MoeBlock, seen: LayerInputs) -> list[float]:
    errors = []
    for expert in range(site.num_experts):
        before, after = run_expert(experts, expert, seen.x_TH)[1].double(), run_expert(other, expert, seen.x_TH)[1].double()
        errors.append(float((before - after).square().sum() / before.square().sum()))
    return errors


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_layer_stays_close(family: str, method: str, family_folder: Callable[[str], Path]) -> None:
    experts, site, skeleton = layer_of(family, family_folder(family))
    seen, untouched, errors = seen_of(site), deepcopy(experts), {}
    for bits in (4, 8):
        step = Quantize(bits=bits, method=method)
        group = step.group_of(skeleton.sites.values())
        assert group == 8  # the widths are 32 and 24
        layer = step.transform(experts, site, None if method == "round" else seen, group, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(experts.parameters(), untouched.parameters(), strict=True))
        assert layer.borrowed == (0 if method == "round" else 2)
        assert len(layer.first) == len(layer.last) == site.num_experts
        for first, last in zip(layer.first, layer.last, strict=True):
            assert_sound(first, site.first, site.hidden, bits, group, torch.float32)
            assert_sound(last, site.hidden, site.width, bits, group, torch.float32)
        other = deepcopy(experts)
        put_back(other, layer)
        for expert in range(site.num_experts):
            w_in, w_out = matrices(other, expert)
            assert torch.equal(w_in, layer.first[expert].dense()) and torch.equal(w_out, layer.last[expert].dense())
        errors[bits] = output_errors(experts, other, site, seen)
    assert 0 < max(errors[4]) < 0.03
    assert all(eight < four / 50 for four, eight in zip(errors[4], errors[8], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_experts(method: str, family_folder: Callable[[str], Path]) -> None:
    experts, site, _ = layer_of("qwen2_moe", family_folder("qwen2_moe"), torch.bfloat16)
    layer = Quantize(method=method).transform(experts, site, seen_of(site, torch.bfloat16), 8, torch.bfloat16)
    put_back(experts, layer)
    assert torch.equal(first_projection(experts)[3], layer.first[3].dense()) and layer.first[3].scale_OG.dtype == torch.bfloat16


@torch.no_grad()
def test_gptq_layer_beats_rounding(family_folder: Callable[[str], Path]) -> None:
    experts, site, _ = layer_of("mixtral", family_folder("mixtral"))
    seen, errors = seen_of(site), {}
    for method in METHODS:
        other = deepcopy(experts)
        put_back(other, Quantize(method=method).transform(experts, site, seen, 8, torch.float32))
        errors[method] = sum(output_errors(experts, other, site, seen))
    assert errors["gptq"] < errors["round"] and errors["awq"] < errors["round"]


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_folding_changes_nothing(family: str, family_folder: Callable[[str], Path]) -> None:
    experts, site, _ = layer_of(family, family_folder(family))
    rows = linear_rows(experts, site.first)
    assert rows == slice(site.width, None)
    other, x_TH = deepcopy(experts), seen_of(site).x_TH
    for expert in range(site.num_experts):
        s_I = torch.exp(torch.randn(site.width, generator=torch.Generator().manual_seed(expert)))
        w_in, w_out = folded(*matrices(experts, expert), s_I, rows)
        first_projection(other)[expert].copy_(w_in)
        other.down_proj[expert].copy_(w_out)
        assert not torch.equal(w_in, first_projection(experts)[expert])
        torch.testing.assert_close(run_expert(other, expert, x_TH)[1], run_expert(experts, expert, x_TH)[1], rtol=1e-4, atol=1e-4)


def test_folding_only_where_it_is_exact(family_folder: Callable[[str], Path]) -> None:
    biased, site, _ = layer_of("gpt_oss", family_folder("gpt_oss"))
    assert linear_rows(biased, site.first) is None
    biased.has_bias = False  # its gate still clamps, and adds one to up
    assert linear_rows(biased, site.first) is None
    experts, site, _ = layer_of("mixtral", family_folder("mixtral"))
    experts._apply_gate = lambda first: torch.nn.functional.silu(first[..., :24]) * first[..., 24:].clamp(-7, 7)
    assert linear_rows(experts, site.first) is None
    experts.has_gate = False
    experts.act_fn = torch.nn.ReLU()
    assert linear_rows(experts, site.width) == slice(None)
    experts.act_fn = torch.nn.SiLU()
    assert linear_rows(experts, site.width) is None


# ---- on paper


def test_groups_fall_back_to_a_common_divisor(family_folder: Callable[[str], Path]) -> None:
    site = next(iter(Skeleton.of(str(family_folder("mixtral"))).sites.values()))
    for pairs, wanted, expected in [
        ([(2048, 768)], 128, 128), ([(2048, 1408), (2048, 1408)], 128, 128), ([(2048, 1408), (2048, 96)], 128, 32), ([(2048, 768)], 40, 32),
        ([(2880, 2880)], 128, 64), ([(96, 96)], 128, 32), ([(2880, 1440)], 128, 32), ([(2880, 2880)], 120, 120), ([(2048, 768)], 256, 256),
        ([(2048, 384)], 256, 128), ([(72, 24)], 128, 24), ([(2048, 768)], 8, 8),
    ]:  # fmt: skip
        assert Quantize(group=wanted).group_of([replace(site, hidden=hidden, width=width) for hidden, width in pairs]) == expected


def test_mistakes_are_explained(family_folder: Callable[[str], Path]) -> None:
    sites = dict(Skeleton.of(str(family_folder("mixtral"))).sites)
    step, decisions = Quantize(), unchanged(sites)
    step.shape(sites, decisions)
    assert step.needs == frozenset() and step.reach(sites) == 0
    index = next(iter(sites))
    with pytest.raises(UserError, match=r"layer 0 are factored; use low_rank with form: dense, or leave quantize out"):
        step.shape({**sites, index: replace(sites[index], factored=True)}, decisions)
    ranks = LayerDecision(keep=decisions[index].keep, in_ranks=(8,) * 8, out_ranks=(8,) * 8)
    with pytest.raises(UserError, match="factored"):
        step.shape(sites, {**decisions, index: ranks})
    step.shape(sites, {**decisions, index: replace(ranks, merged=True)})
    with pytest.raises(UserError, match=r"no group of 8 to 128 inputs divides the experts' widths \[20, 24, 32\]"):
        step.shape({**sites, index: replace(sites[index], width=20)}, decisions)


@pytest.mark.parametrize("fields", [{"bits": 3}, {"group": 4}, {"method": "hqq"}, {"scope": "model"}, {"ratio": 0.5}])
def test_fields_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Quantize(**fields)
