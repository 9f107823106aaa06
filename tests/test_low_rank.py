"""The best factors under a whitening, against the singular value decomposition of the whitened matrix in float64."""

from __future__ import annotations

import pytest
import torch

from trimoe.methods.low_rank.factors import factor, leading, spectrum
from trimoe.modeling_trimoe import DENSE
from trimoe.walk.expert_inputs import POOL_WEIGHT, ExpertInputs, LayerSample


def moment_of(size: int, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, size, dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("rank", [0, 8, 16, 40])
@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(48, 96), (96, 48), (64, 64)])
def test_nothing_of_this_rank_is_nearer(rows: int, columns: int, whiten: bool, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows + rank)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    moment = moment_of(columns, generator) if whiten else None
    cut = factor(w, moment, rank)
    whitening = torch.eye(columns, dtype=torch.float64) if moment is None else torch.linalg.cholesky(moment)
    values = torch.linalg.svdvals(w @ whitening)
    assert cut.product.shape == w.shape
    assert torch.linalg.matrix_rank(cut.product) == rank
    error = torch.linalg.matrix_norm((w - cut.product) @ whitening)
    torch.testing.assert_close(error, values[rank:].square().sum().sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(spectrum(w, moment), values.square(), rtol=1e-8, atol=1e-10 * float(values[0]) ** 2)


def test_a_matrix_of_less_rank_than_asked_for_is_given_back() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(96, 4, generator=generator, dtype=torch.float64) @ torch.randn(4, 48, generator=generator, dtype=torch.float64)
    for matrix in (w, w.T):
        torch.testing.assert_close(factor(matrix, None, 16).product, matrix, rtol=1e-8, atol=1e-8)
    assert torch.equal(factor(w, None, DENSE).product, w)
    assert not factor(torch.zeros_like(w), None, 8).product.any()


@pytest.mark.parametrize("count", [1, 30, 31, 90])  # a third of the size is where the way of finding them changes
def test_leading_are_the_last_of_all(count: int) -> None:
    gram = moment_of(90, torch.Generator().manual_seed(count))
    values, vectors = leading(gram, count)
    every, all_vectors = torch.linalg.eigh(gram)
    torch.testing.assert_close(values, every.flip(0)[:count], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gram @ vectors, vectors * values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-10)
    assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all(), "no sign is left to chance"
    best = all_vectors.flip(1)[:, :count]
    torch.testing.assert_close(vectors @ vectors.T, best @ best.T, rtol=0, atol=1e-7)


def test_a_given_moment_counts_routed_tokens_by_their_weight_and_the_pool_beside_them() -> None:
    generator = torch.Generator().manual_seed(1)
    x, gate, pool = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 6), (20,), (50, 6)))
    own = sum(g**2 * torch.outer(row, row) for g, row in zip(gate, x, strict=True)) / sum(g**2 for g in gate)
    layer = sum(torch.outer(row, row) for row in pool) / len(pool)
    want = (20 * own + POOL_WEIGHT * layer) / (20 + POOL_WEIGHT)
    given = ExpertInputs(x, gate.float(), LayerSample(pool))
    torch.testing.assert_close(given.moment, want, rtol=1e-5, atol=1e-6)  # products are taken in float32
    torch.testing.assert_close(given.blended(x, x, pool, pool), given.moment, rtol=0, atol=0)
    torch.testing.assert_close(ExpertInputs(x[:0], gate[:0].float(), LayerSample(pool)).moment, layer, rtol=1e-5, atol=1e-6)
