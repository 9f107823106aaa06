"""Masks by magnitude, Wanda, MoE-Pruner and SparseGPT against slow references in float64.

Letters: O outputs, I inputs, S routed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimoe.errors import UserError
from trimoe.methods.quantize.rounding import DAMP, weighted_error
from trimoe.methods.weight_prune.masks import (
    Pattern,
    dropped_of,
    input_norms,
    keep_pattern,
    keep_per_layer,
    keep_per_row,
    magnitude,
    sparsegpt,
    weighted,
)

RATIOS = [0.5, 0.29, 0.75]
PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 3)]
EXACT = {0.0: Fraction(0), 0.5: Fraction(1, 2), 0.29: Fraction(29, 100), 0.75: Fraction(3, 4), 1.0: Fraction(1)}


def weights(rows: int, columns: int, seed: int) -> torch.Tensor:
    return 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs_of(columns: int, seed: int, tokens: int = 600) -> torch.Tensor:
    """Inputs that share a few directions and differ in size by some ten times."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.5
    size = torch.exp(0.8 * torch.randn(columns, generator=generator))
    return (torch.randn(tokens, columns, generator=generator) @ mix.T) * size


def correlated_moment(columns: int, seed: int, tokens: int = 600) -> torch.Tensor:
    x_SI = inputs_of(columns, seed, tokens).double()
    return x_SI.T @ x_SI / tokens


def levels(shape: Sequence[int], seed: int, most: int) -> torch.Tensor:
    """Scores that are small integers: many ties."""
    return torch.randint(0, most + 1, tuple(shape), generator=torch.Generator().manual_seed(seed)).float()


def kept(values: Sequence[float], count: int) -> list[bool]:
    """All but the `count` lowest; the earlier of equal ones goes."""
    lost = sorted(range(len(values)), key=lambda place: (values[place], place))[:count]
    return [place not in set(lost) for place in range(len(values))]


# ---- patterns and counts


def test_patterns_are_read() -> None:
    for pattern in [*PATTERNS, Pattern(1, 2), Pattern(63, 64)]:
        assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse("2:4") == Pattern(keep=2, of=4)


@pytest.mark.parametrize(
    "text", ["", "2", "124", "2:", "2-4", "2:4:8", "a:b", " 2:4", "2:4\n", "-1:4", "0:4", "4:4", "5:4", "2:65", "2.0:4", "\uff12:4"]
)
def test_nonsense_patterns_are_explained(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Pattern.parse(text)
    assert f'"{text}"' in str(caught.value) and "1 <= n < m <= 64" in str(caught.value) and '"2:4"' in str(caught.value)


@given(st.integers(0, 10**9), st.integers(0, 10000))
def test_dropped_is_the_floor(length: int, share: int) -> None:
    assert dropped_of(length, share / 10000) == length * share // 10000


def test_dropped_is_not_fooled_by_floats() -> None:
    assert int(0.29 * 100) == 28 and int(0.29 * 10**8) == 28_999_999
    assert dropped_of(100, 0.29) == 29 and dropped_of(10**8, 0.29) == 29_000_000
    assert dropped_of(100, 1 - 0.71) == 29 and dropped_of(10, 0.7 - 0.4) == 3 and dropped_of(7, 0.5) == 3 and dropped_of(0, 0.5) == 0
    score_OI = levels((3, 100), 0, 5)
    assert (~keep_per_row(score_OI, 0.29)).sum(1).tolist() == [29] * 3
    assert (
        int((~keep_per_layer([score_OI[:1]], 0.29)[0]).sum()) == int((~sparsegpt(score_OI[:1], torch.eye(100), ratio=0.29)[1]).sum()) == 29
    )


# ---- scores


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 37, 1024, 2500])
def test_input_norms_are_the_loop(tokens: int, dtype: torch.dtype, gated: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x_SI, gate_S = torch.randn(tokens, 5, generator=generator).to(dtype), torch.rand(tokens, generator=generator)
    norm_I = input_norms(x_SI, gate_S if gated else None)
    assert norm_I.dtype == torch.float32 and norm_I.shape == (5,)
    rows, gates = x_SI.double().tolist(), gate_S.double().tolist() if gated else [1.0] * tokens
    for i in range(5):
        square = math.fsum((gate * row[i]) ** 2 for gate, row in zip(gates, rows, strict=True))
        assert float(norm_I[i]) == pytest.approx(math.sqrt(square), rel=1e-6)


def test_input_norms_of_many_tokens_stay_exact() -> None:
    x_SI = torch.full((20_000, 1), 0.1)
    x_SI[0] = 3e4  # in float32 the rest would vanish beside its square
    assert float(input_norms(x_SI).double().square() - input_norms(x_SI[:1]).double().square()) == pytest.approx(200, rel=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_scores_are_the_loop(gated: bool, dtype: torch.dtype) -> None:
    w_OI, x_SI = weights(4, 7, 0).to(dtype), inputs_of(7, 0, 30).to(dtype)
    gate_S = torch.rand(30, generator=torch.Generator().manual_seed(1)) if gated else None
    score_OI = weighted(w_OI, input_norms(x_SI, gate_S))
    assert magnitude(w_OI).dtype == score_OI.dtype == torch.float32
    for o in range(4):
        for i in range(7):
            squares = [(float(x_SI[s, i]) * (float(gate_S[s]) if gate_S is not None else 1)) ** 2 for s in range(30)]
            assert float(magnitude(w_OI)[o, i]) == abs(float(w_OI[o, i]))
            assert float(score_OI[o, i]) == pytest.approx(abs(float(w_OI[o, i])) * math.sqrt(sum(squares)), rel=1e-5)


@pytest.mark.parametrize("gate", [1.0, 0.5, 0.125])
def test_constant_gates_are_wanda(gate: float) -> None:
    w_OI, x_SI = weights(24, 65, 1), inputs_of(65, 1)
    plain, gated = weighted(w_OI, input_norms(x_SI)), weighted(w_OI, input_norms(x_SI, torch.full((len(x_SI),), gate)))
    assert torch.equal(keep_per_row(plain, 0.5), keep_per_row(gated, 0.5))
    assert not torch.equal(keep_per_row(plain, 0.5), keep_per_row(magnitude(w_OI), 0.5))


def test_gates_matter() -> None:
    w_OI, x_SI = weights(24, 64, 1), inputs_of(64, 1)
    gate_S = torch.rand(len(x_SI), generator=torch.Generator().manual_seed(0)) ** 8
    plain, gated = weighted(w_OI, input_norms(x_SI)), weighted(w_OI, input_norms(x_SI, gate_S))
    assert not torch.equal(keep_per_row(plain, 0.5), keep_per_row(gated, 0.5))


def test_experts_without_tokens_fall_back_to_magnitude() -> None:
    w_OI = weights(6, 10, 2)
    for norm_I in (input_norms(torch.zeros(0, 10)), input_norms(torch.zeros(0, 10), torch.zeros(0)), torch.zeros(10)):
        assert torch.equal(weighted(w_OI, norm_I), magnitude(w_OI))
    norm_I = torch.zeros(10)
    norm_I[3] = 2
    score_OI = weighted(w_OI, norm_I)
    assert torch.equal(score_OI[:, 3], 2 * w_OI[:, 3].abs()) and not score_OI[:, [0, 1, 2, 4]].any()


# ---- masks


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), columns=st.integers(1, 40), ratio=st.sampled_from(sorted(EXACT)), most=st.sampled_from([0, 2, 9, 10**6]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_are_the_loop(rows: int, columns: int, ratio: float, most: int, seed: int) -> None:
    score_OI = levels((rows, columns), seed, most)
    mask_OI = keep_per_row(score_OI, ratio)
    assert mask_OI.dtype == torch.bool and mask_OI.shape == (rows, columns)
    assert mask_OI.tolist() == [kept(row, math.floor(EXACT[ratio] * columns)) for row in score_OI.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5), groups=st.integers(1, 9), pattern=st.sampled_from(PATTERNS), most=st.sampled_from([0, 2, 9, 10**6]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_patterns_are_the_loop(rows: int, groups: int, pattern: Pattern, most: int, seed: int) -> None:
    score_OI = levels((rows, groups * pattern.of), seed, most)
    mask_OI = keep_pattern(score_OI, pattern)
    assert mask_OI.dtype == torch.bool and mask_OI.shape == score_OI.shape
    for o, row in enumerate(score_OI.tolist()):
        for start in range(0, len(row), pattern.of):
            group = slice(start, start + pattern.of)
            assert mask_OI[o, group].tolist() == kept(row[group], pattern.of - pattern.keep)


def test_patterns_want_whole_groups() -> None:
    with pytest.raises(RuntimeError):
        keep_pattern(torch.ones(2, 6), Pattern(2, 4))
    with pytest.raises(RuntimeError):
        sparsegpt(torch.ones(2, 6), torch.eye(6), pattern=Pattern(2, 4))


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 17)), min_size=1, max_size=4), ratio=st.sampled_from(sorted(EXACT)),
    most=st.sampled_from([0, 2, 9, 10**6]), size=st.sampled_from([1e-44, 1e-9, 1.0, 1e30]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_layers_are_the_loop(shapes: list[tuple[int, int]], ratio: float, most: int, size: float, seed: int) -> None:
    scores = [size * levels(shape, seed + place, most) for place, shape in enumerate(shapes)]
    values = [value for score in scores for row in score.tolist() for value in row]
    masks = keep_per_layer(scores, ratio)
    assert [mask.shape for mask in masks] == [score.shape for score in scores] and all(mask.dtype == torch.bool for mask in masks)
    flat = [stays for mask in masks for row in mask.tolist() for stays in row]
    assert flat == kept(values, math.floor(EXACT[ratio] * len(values)))


@pytest.mark.parametrize("ratio", RATIOS)
def test_layers_lose_exactly_their_share_where_it_costs_least(ratio: float) -> None:
    scores = [magnitude(weights(33, 41, 0)), 0.1 * magnitude(weights(33, 41, 1)), magnitude(weights(20, 50, 2)).T]
    masks = keep_per_layer(scores, ratio)
    total = 2 * 33 * 41 + 1000
    assert sum(int((~mask).sum()) for mask in masks) == math.floor(EXACT[ratio] * total)
    lost = [float((~mask).double().mean()) for mask in masks]
    assert lost[1] > lost[0] + 0.2 and lost[1] > lost[2] + 0.2
    highest = max(float(score[~mask].max()) for score, mask in zip(scores, masks, strict=True) if not bool(mask.all()))
    assert highest < min(float(score[mask].min()) for score, mask in zip(scores, masks, strict=True) if bool(mask.any()))


# ---- SparseGPT


def reference_sparsegpt(
    w_OI: torch.Tensor, moment: torch.Tensor, ratio: float | None, pattern: Pattern | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, mask) as the paper's code has it, in float64: two factorisations, weights [O, I], one column after the other, no lazy
    blocks: every column behind hears of an error at once."""
    w_OI, block = w_OI.double().clone(), 128 - 128 % pattern.of if pattern else 128
    damping = DAMP * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(moment + damping), upper=True)
    w_OI[:, moment.diagonal() == 0] = 0
    mask = torch.ones(w_OI.shape, dtype=torch.bool)
    outputs, inputs = w_OI.shape
    for i in range(inputs):
        if ratio is not None and i % block == 0:
            part = w_OI[:, i : i + block] ** 2 / upper.diagonal()[i : i + block] ** 2
            stays = kept(part.flatten().tolist(), math.floor(EXACT[ratio] * part.numel()))
            mask[:, i : i + block] = torch.tensor(stays).view(part.shape)
        if pattern is not None and i % block % pattern.of == 0:
            part = w_OI[:, i : i + pattern.of] ** 2 / upper.diagonal()[i : i + pattern.of] ** 2
            for o in range(outputs):
                mask[o, i : i + pattern.of] = torch.tensor(kept(part[o].tolist(), pattern.of - pattern.keep))
        new_O = torch.where(mask[:, i], w_OI[:, i], 0)
        w_OI[:, i:] -= torch.outer((w_OI[:, i] - new_O) / upper[i, i], upper[i, i:])
        w_OI[:, i] = new_O
    return w_OI, mask


def assert_is_reference(w_OI: torch.Tensor, moment: torch.Tensor, ratio: float | None, pattern: Pattern | None) -> None:
    new_OI, mask_OI = sparsegpt(w_OI, moment, ratio=ratio, pattern=pattern)
    expected, mask = reference_sparsegpt(w_OI, moment, ratio, pattern)
    assert new_OI.dtype == torch.float32 and mask_OI.dtype == torch.bool and new_OI.shape == mask_OI.shape == w_OI.shape
    assert new_OI.is_contiguous() and mask_OI.is_contiguous()
    assert not new_OI[~mask_OI].any()
    assert torch.equal(mask_OI, mask)
    torch.testing.assert_close(new_OI.double(), expected, rtol=1e-3, atol=2e-3 * float(w_OI.abs().max()))


@pytest.mark.parametrize("columns", [1, 37, 128, 129, 300])
@pytest.mark.parametrize("ratio", RATIOS)
def test_sparsegpt_by_ratio_is_the_reference(ratio: float, columns: int) -> None:
    assert_is_reference(weights(9, columns, 4), correlated_moment(columns, 4), ratio, None)


@pytest.mark.parametrize("groups", [1, 11, 43, 80])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(5, 48)], ids=str)
def test_sparsegpt_by_pattern_is_the_reference(pattern: Pattern, groups: int) -> None:
    groups = min(groups, 320 // pattern.of)
    assert_is_reference(weights(9, groups * pattern.of, 5), correlated_moment(groups * pattern.of, 5), None, pattern)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_sparsegpt_of_nothing_and_of_all(ratio: float) -> None:
    w_OI = weights(4, 150, 0)
    new_OI, mask_OI = sparsegpt(w_OI, correlated_moment(150, 0), ratio=ratio)
    assert torch.equal(new_OI, w_OI if ratio == 0 else torch.zeros_like(w_OI)) and bool((mask_OI == (ratio == 0)).all())


def test_sparsegpt_wants_one_of_ratio_and_pattern() -> None:
    for both in ({}, {"ratio": 0.5, "pattern": Pattern(2, 4)}):
        with pytest.raises(ValueError, match="one of ratio and pattern"):
            sparsegpt(torch.ones(2, 4), torch.eye(4), **both)


@pytest.mark.parametrize("ratio", RATIOS)
def test_sparsegpt_counts_every_block(ratio: float) -> None:
    mask_OI = sparsegpt(levels((7, 300), 0, 3), torch.eye(300), ratio=ratio)[1]
    for start in range(0, 300, 128):
        part = mask_OI[:, start : start + 128]
        assert int((~part).sum()) == math.floor(EXACT[ratio] * part.numel())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [1e-25, 1.0])
def test_sparsegpt_with_independent_inputs_is_magnitude(ratio: float, size: float) -> None:
    w_OI = size * levels((6, 128), 1, 5)  # ties in plenty
    new_OI, mask_OI = sparsegpt(w_OI, torch.eye(128), ratio=ratio)
    assert torch.equal(mask_OI, keep_per_layer([w_OI], ratio)[0]) and torch.equal(new_OI, w_OI * mask_OI)
    new_OI, mask_OI = sparsegpt(w_OI, torch.eye(128), pattern=Pattern(2, 4))
    assert torch.equal(mask_OI, keep_pattern(w_OI, Pattern(2, 4))) and torch.equal(new_OI, w_OI * mask_OI)


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"pattern": Pattern(2, 4)}], ids=["ratio", "pattern"])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_beats_masks_alone(seed: int, how: dict[str, Any]) -> None:
    x_SI, w_OI = inputs_of(192, seed), weights(32, 192, seed)
    moment = x_SI.double().T @ x_SI.double() / len(x_SI)

    def error(new_OI: torch.Tensor) -> float:
        return float(weighted_error(w_OI, new_OI, moment))

    keep = (lambda score: keep_per_row(score, 0.5)) if "ratio" in how else (lambda score: keep_pattern(score, Pattern(2, 4)))
    plain, wanda = (error(w_OI * keep(score)) for score in (magnitude(w_OI), weighted(w_OI, input_norms(x_SI))))
    solved = error(sparsegpt(w_OI, moment, **how)[0])
    assert solved < 0.6 * wanda and wanda < plain


@pytest.mark.parametrize("size", [1e-12, 1e6])
def test_sparsegpt_does_not_depend_on_the_inputs_unit(size: float) -> None:
    w_OI, moment = weights(6, 64, 6), correlated_moment(64, 6)
    (one, mask), (other, other_mask) = (sparsegpt(w_OI, m, ratio=0.5) for m in (moment, size * moment))
    assert torch.equal(mask, other_mask)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pattern", [None, Pattern(2, 4)], ids=str)
def test_sparsegpt_empties_dead_inputs_first(pattern: Pattern | None) -> None:
    w_OI, moment = weights(6, 64, 7), correlated_moment(64, 7)
    dead = [3, 16, 17, 18, 40]  # three of one group of four, where the pattern keeps one of them
    moment[dead] = 0
    moment[:, dead] = 0
    assert_is_reference(w_OI, moment, None if pattern else 0.5, pattern)
    new_OI, mask_OI = sparsegpt(w_OI, moment, ratio=None if pattern else 0.5, pattern=pattern)
    assert int((~mask_OI).sum()) == 6 * 64 // 2 and not new_OI[:, dead].any()
    if pattern:
        assert mask_OI[:, 16:20].tolist() == [[False, False, True, True]] * 6
    else:
        assert not mask_OI[:, dead].any()
        few = sparsegpt(w_OI, moment, ratio=0.0)
        assert bool(few[1].all()) and not few[0][:, dead].any()


def test_sparsegpt_without_tokens_is_magnitude() -> None:
    w_OI = weights(6, 64, 8)
    new_OI, mask_OI = sparsegpt(w_OI, torch.zeros(64, 64), ratio=0.5)
    assert torch.equal(mask_OI, keep_per_layer([magnitude(w_OI)], 0.5)[0]) and torch.equal(new_OI, w_OI * mask_OI)


def test_sparsegpt_with_fewer_tokens_than_inputs_and_one_giant_input() -> None:
    w_OI, moment = weights(6, 130, 8), correlated_moment(130, 8, tokens=5)
    moment[9] *= 1e4
    moment[:, 9] *= 1e4
    new_OI, mask_OI = sparsegpt(w_OI.bfloat16(), moment, ratio=0.5)
    assert bool(new_OI.isfinite().all()) and int((~mask_OI).sum()) == 6 * 130 // 2


# ---- what is given stays as it is


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (5, 1)])
def test_inputs_are_unchanged(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w_OI, x_SI = weights(*shape, 0).to(dtype), inputs_of(shape[1], 0, 30)
    moment, gate_S = (x_SI.T @ x_SI).double(), torch.rand(30, generator=torch.Generator().manual_seed(0))
    norm_I = input_norms(x_SI, gate_S)
    score_OI = weighted(w_OI, norm_I)
    given_tensors = [w_OI, x_SI, moment, gate_S, norm_I, score_OI]
    before = [tensor.clone() for tensor in given_tensors]
    magnitude(w_OI)[0] = 7
    weighted(w_OI, norm_I)
    input_norms(x_SI, gate_S)
    keep_per_row(score_OI, 0.5)
    keep_per_layer([score_OI, score_OI], 0.5)
    new_OI = sparsegpt(w_OI, moment, ratio=0.75)[0]
    if shape[1] > 1:
        keep_pattern(score_OI, Pattern(2, 4))
        sparsegpt(w_OI, moment, pattern=Pattern(2, 4))
    new_OI += 1
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))
