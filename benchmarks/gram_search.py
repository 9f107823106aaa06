"""What a candidate set of experts costs to evaluate: from the Gram of the expert outputs, or by running the MoE block again without them.

    python benchmarks/gram_search.py

"Again" is an efficient per-expert loop: the router's logits are there already, the survivors are re-routed with the dropped logits at
-inf, each expert runs once on its own tokens, and the output is compared with the original's. "Gram" is trimoe.methods.expert_drop.subset.SubsetLoss on a
population of 100 random sets, as a search calls it. Both in float32 on the same tokens, in turns in one process; the ratio is of times
per candidate. The last columns say how far the two losses are apart, and what making the Gram once costs in candidates run again.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch
from alternate import common_options, middle, ratio, table, take_turns, write_json
from torch.nn import functional as F

from trimoe.calibration.observer import Observer
from trimoe.calibration.search_tokens import search_tensors
from trimoe.calibration.statistics import LayerStats
from trimoe.methods.expert_drop.subset import SubsetLoss
from trimoe.model.router import RoutingRule

SHAPES = {
    "Mixtral: 8 experts, top 2": dict(
        hidden=1024, width=3584, experts=8, drop=2, rule=RoutingRule(score="softmax", top_k=2, renormalise=True)
    ),
    "64 experts, top 6": dict(hidden=1024, width=704, experts=64, drop=16, rule=RoutingRule(score="softmax", top_k=6, renormalise=True)),
    "128 experts, top 8": dict(hidden=512, width=256, experts=128, drop=32, rule=RoutingRule(score="softmax", top_k=8, renormalise=True)),
    "DeepSeek-V3: 64 experts in 8 groups": dict(
        hidden=1024, width=704, experts=64, drop=16,
        rule=RoutingRule(score="sigmoid", top_k=6, renormalise=True, groups=8, topk_group=4, group_score="top2", biased_choice=True, scale=2.5),
    ),
}  # fmt: skip


class Block:
    """A MoE block of random weights on random tokens: X ~ N(0, 1), router rows ~ N(0, 1/H)."""

    is_transposed, has_bias, has_gate = False, False, True

    def __init__(self, rule: RoutingRule, hidden: int, width: int, experts: int, tokens: int, seed: int):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        self.rule, self.num_experts, self.hidden = rule, experts, hidden
        self.x_TH = normal(tokens, hidden)
        self.logits_TE = self.x_TH @ normal(experts, hidden).T / hidden**0.5
        self.bias_E = 0.1 * normal(experts) if rule.biased_choice else None
        self.gate_up_proj = normal(experts, 2 * width, hidden).div_(hidden**0.5)
        self.down_proj = normal(experts, hidden, width).div_(width**0.5)

    def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
        gate, up = first.chunk(2, -1)
        return F.silu(gate) * up

    def run(self, keep_E: torch.Tensor | None = None) -> torch.Tensor:
        """F(X) with only the experts of `keep_E`."""
        weights_TK, index_TK = self.rule.route(self.logits_TE, self.bias_E, keep_E)
        order_S = index_TK.flatten().argsort()
        token_S, gate_S1 = order_S // self.rule.top_k, weights_TK.flatten()[order_S].unsqueeze(1)
        sizes = torch.bincount(index_TK.flatten(), minlength=self.num_experts).tolist()
        out_TH = torch.zeros_like(self.x_TH)
        for expert, (token, gate) in enumerate(zip(token_S.split(sizes), gate_S1.split(sizes), strict=True)):
            if len(token):
                h = self._apply_gate(F.linear(self.x_TH[token], self.gate_up_proj[expert]))
                out_TH.index_add_(0, token, F.linear(h, self.down_proj[expert]).mul_(gate))
        return out_TH

    def statistics(self, reach: int) -> LayerStats:
        """The search tokens' Gram, made as the statistics pass makes it."""
        stats = LayerStats(0, self.rule, bias_E=self.bias_E)
        site = SimpleNamespace(layer=0, rule=self.rule, num_experts=self.num_experts, hidden=self.hidden)
        for name, (shape, dtype) in search_tensors(site, reach, len(self.x_TH)).items():  # type: ignore[arg-type]
            stats.search[name] = torch.ones(shape, dtype=dtype)
        Observer(site, stats, frozenset()).see_search(self, self.x_TH, self.logits_TE, 0)  # type: ignore[arg-type]
        return stats


def random_sets(count: int, experts: int, drop: int, groups: int, seed: int) -> torch.Tensor:
    """drop_PE: equally many experts of every router group."""
    noise = torch.rand(count, groups, experts // groups, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(noise.shape, dtype=torch.bool).scatter_(-1, noise.topk(drop // groups)[1], True).flatten(1)


@torch.no_grad()
def measure(name: str, rule: RoutingRule, hidden: int, width: int, experts: int, drop: int, given: argparse.Namespace) -> dict[str, object]:
    block = Block(rule, hidden, width, experts, given.tokens, given.seed)
    original = block.run()
    norm = original.double().norm()
    reach = rule.top_k + drop if rule.ordered else experts
    making = middle(take_turns({"": lambda: block.statistics(reach)}, 3, given.clock)[""])
    loss = SubsetLoss(block.statistics(reach))
    sets_PE = random_sets(given.population, experts, drop, rule.groups, given.seed)
    again: dict[int, float] = {}
    turn = iter(range(10**9))

    def run_again() -> None:
        candidate = next(turn) % given.population
        again[candidate] = float((block.run(~sets_PE[candidate]) - original).double().norm() / norm)

    times = take_turns({"again": run_again, "gram": lambda: loss(sets_PE)}, given.rounds, given.clock)
    per_candidate = [value / given.population for value in times["gram"]]
    fast = loss(sets_PE)
    error = max(abs(value - float(fast[candidate])) / value for candidate, value in again.items())
    naive = middle(times["again"])
    return {
        "block": name, "again, ms": f"{1e3 * naive:.1f}", "Gram, ms": f"{1e3 * middle(per_candidate):.4f}",
        "ratio (quartiles)": ratio(times["again"], per_candidate), "relative error": f"{error:.0e}",
        "making the Gram": f"{making / naive:.1f} candidates",
    }  # fmt: skip


def main() -> None:
    arguments = common_options(__doc__, rounds=15)
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--population", type=int, default=100)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(name, **shape, given=given) for name, shape in SHAPES.items()]  # type: ignore[arg-type]
    print(table(rows))
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
