"""Which tokens a layer's search looks at: against a slow reference, every order of a small text, and one process against several.

Letters: T tokens, N taken, E experts, k chosen.
"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from trimoe.calibration.search_tokens import ENOUGH, Candidates, choose, most_held, shuffled


def routed(tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts of each token, the last ones rarely."""
    chance_E = 0.8 ** torch.arange(experts, dtype=torch.float64)
    return torch.multinomial(chance_E.expand(tokens, -1), top_k, generator=torch.Generator().manual_seed(seed))


def slow_choice(rank: list[int], index: list[list[int]], experts: int, size: int, enough: int) -> dict[int, float]:
    """Of each token that is taken, the weight: tried at every other rank that it could have had, the order of the others as it is."""

    def taken(order: list[int]) -> set[int]:
        for quota in range(enough, -1, -1):
            needed = {t for expert in range(experts) for t in [t for t in order if expert in index[t]][:quota]}
            if len(needed) <= size:
                break
        for t in order:
            if len(needed) < size:
                needed.add(t)
        return needed

    order = sorted(range(len(rank)), key=rank.__getitem__)
    found = {}
    for t in taken(order):
        others = [other for other in order if other != t]
        ways = [t in taken([*others[:at], t, *others[at:]]) for at in range(len(rank))]
        found[t] = len(rank) / sum(ways)
    return found


@pytest.mark.parametrize(
    ("tokens", "top_k", "size", "enough"), [(24, 2, 20, 3), (24, 2, 12, 2), (30, 1, 12, 2), (30, 3, 29, 5), (24, 2, 24, 3)]
)
def test_choice_is_the_slow_one(tokens: int, top_k: int, size: int, enough: int) -> None:
    for seed in range(6):
        rank_T, index_TK = shuffled(tokens, seed), routed(tokens, 6, top_k, seed)
        want = slow_choice(rank_T.tolist(), index_TK.tolist(), 6, size, enough)
        position_N, weight_N = choose(rank_T, index_TK, 6, size, enough)
        assert position_N.tolist() == sorted(want) and len(want) == size
        torch.testing.assert_close(weight_N, torch.tensor([want[t] for t in sorted(want)]))


def test_every_order_together_weighs_each_token_once() -> None:
    """Unbiased, so for every single token: over all orders of the text its mean weight is 1."""
    index_TK = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 2], [0, 3], [0, 1]])
    total_T, orders = torch.zeros(6, dtype=torch.float64), list(permutations(range(6)))
    for order in orders:
        position_N, weight_N = choose(torch.tensor(order), index_TK, 4, 4, 1)
        total_T[position_N] += weight_N.double()
    torch.testing.assert_close(total_T / len(orders), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)


def test_every_expert_has_its_tokens_or_all_have_as_many_fewer() -> None:
    index_TK = routed(6000, 24, 2)
    all_E = torch.bincount(index_TK.flatten(), minlength=24)
    assert int(all_E.min()) < ENOUGH < int(all_E.float().mean()), "some experts have fewer in the whole text"
    for size, enough in ((3000, ENOUGH), (400, None)):
        position_N, weight_N = choose(shuffled(6000, 1), index_TK, 24, size)
        own_E = torch.bincount(index_TK[position_N].flatten(), minlength=24)
        assert len(position_N) == size and bool((weight_N >= 1).all())
        assert float(weight_N.sum()) == pytest.approx(6000, rel=0.1)
        if enough is None:  # the least of them is as high as it can be
            enough = int(own_E[all_E >= ENOUGH].min())
            assert 0 < enough < ENOUGH
        assert bool((own_E >= all_E.clamp_max(enough)).all())


def test_without_scarce_experts_it_is_the_first_of_the_shuffle() -> None:
    rank_T, index_TK = shuffled(5000, 3), torch.stack([torch.arange(5000) % 4, 4 + torch.arange(5000) % 4], 1)
    position_N, weight_N = choose(rank_T, index_TK, 8, 2000)
    assert torch.equal(position_N, (rank_T < 2000).nonzero().flatten()) and weight_N.tolist() == [2.5] * 2000


@pytest.mark.parametrize("spans", [[(0, 40)], [(0, 15), (15, 40)]])
def test_candidates_hold_what_is_taken(spans: list[tuple[int, int]]) -> None:
    """Batches as they come, in one process or two: what was taken is still there, and not much else."""
    size, tokens, experts, batch = 300, 4000, 12, 100
    rank_T, index_TK, x_TH = shuffled(tokens, 5), routed(tokens, experts, 2), torch.arange(tokens).unsqueeze(1)
    position_N, _ = choose(rank_T, index_TK, experts, size)
    got = []
    for first, last in spans:
        rows = slice(first * batch, last * batch)
        candidates = Candidates(rank_T[rows], tokens, experts, size)
        for start in range(rows.start, rows.stop, batch):
            part = slice(start, start + batch)
            candidates.see(x_TH[part], -x_TH[part], index_TK[part])
            assert candidates.held <= most_held(tokens, experts, size) + batch
        assert torch.equal(torch.cat(candidates.index).long(), index_TK[rows])
        taken_T = torch.zeros(rows.stop - rows.start, dtype=torch.bool)
        taken_T[position_N[(position_N >= rows.start) & (position_N < rows.stop)] - rows.start] = True
        for at in range(last - first):
            x, logits = candidates.of(at, taken_T)
            assert torch.equal(x, -logits)
            got += x.flatten().tolist()
    assert got == position_N.tolist()
