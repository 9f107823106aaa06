"""One number per expert from a layer's statistics: how much it matters (higher stays). One function each.

Letters: T tokens, E experts; g the weight that multiplies an expert's output, y the output before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trimoe.calibration.statistics import LayerStats
from trimoe.methods.expert_drop.subset import SubsetLoss


def frequency(stats: LayerStats) -> torch.Tensor:
    """How many tokens were routed to the expert, [E]."""
    return stats["count_E"]


def gate(stats: LayerStats) -> torch.Tensor:
    """Mean routing weight over all tokens (Expert Drop, arXiv 2406.02500)."""
    return stats["gate_sum_E"] / stats["tokens"]


def output_norm(stats: LayerStats) -> torch.Tensor:
    """Sum of ||y|| over routed tokens (EAN)."""
    return stats["norm_sum_E"]


def reap(stats: LayerStats) -> torch.Tensor:
    """Mean of g||y|| over routed tokens (REAP, arXiv 2510.13999)."""
    return stats["gate_norm_sum_E"] / stats["count_E"].clamp_min(1)


def coactivation(stats: LayerStats) -> torch.Tensor:
    """Order in which the greedy minimum of p^T F p takes experts, F = sum_t g g' <y, y'>: the first to go scores lowest."""
    energy_EE = stats["energy_EE"]
    count = len(energy_EE)
    rank_E, gone = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.bool)
    for place in range(count):
        added_E = energy_EE.diagonal() + 2 * energy_EE[:, gone].sum(1)
        expert = int(added_E.masked_fill(gone, torch.inf).argmin())
        rank_E[expert], gone[expert] = place, True
    return rank_E


def leave_one_out(stats: LayerStats) -> torch.Tensor:
    """Relative loss ||F(X) - F(X; E minus e)|| / ||F(X)|| with tokens re-routed (MoE-I2, arXiv 2411.01016, section 3.1).

    Where the router could not do without even one expert (a layer at its floor, or router groups that only lose together), what each
    expert contributes stands in: sqrt(sum (g||y||)^2) / ||F(X)||.
    """
    return _alone(stats, SubsetLoss(stats))


def _alone(stats: LayerStats, loss: SubsetLoss) -> torch.Tensor:
    """The relative loss of dropping each expert alone, [E] float64, or what stands in for it."""
    if loss.max_drop < 1:
        return (stats["gate_norm_sq_E"] / stats["energy_EE"].sum().clamp_min(1e-30)).sqrt()
    return loss(torch.eye(stats.num_experts, dtype=torch.bool))


def raw_leave_one_out(stats: LayerStats) -> torch.Tensor:
    """MoE-I2's importance as it is printed: ||F(X) - F(X; E minus e)||_F over the search tokens, [E], not divided by anything."""
    loss = SubsetLoss(stats)
    return _alone(stats, loss) * loss.norm


def weights(stats: LayerStats) -> torch.Tensor:
    """Data-free: mean |w| / rms(w) over the expert's weights; gathered with the statistics, needs no token."""
    return stats["weight_score_E"]


SCORES: dict[str, Callable[[LayerStats], torch.Tensor]] = {
    function.__name__: function for function in (leave_one_out, reap, gate, frequency, output_norm, coactivation, weights)
}


def super_experts(layers: dict[int, LayerStats]) -> dict[int, tuple[int, ...]]:
    """Experts with extreme activations, by layer: max |y| above both the 99.5 % quantile and a tenth of the maximum over all experts."""
    if not layers:
        return {}
    everything = torch.cat([stats["max_abs_E"] for stats in layers.values()])
    bound = max(float(torch.quantile(everything, 0.995)), float(everything.max()) / 10)
    return {index: tuple((stats["max_abs_E"] > bound).nonzero().flatten().tolist()) for index, stats in layers.items()}
