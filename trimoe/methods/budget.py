"""How many where: one total shared out over layers, experts and matrices.

The expert counts and ranks are those of MoE-I2 (https://arxiv.org/abs/2411.01016), which prints a formula for the
ranks only. Everything here is arithmetic on numbers already measured.

Shapes: L layers, E experts of a layer, N numbers of dropped experts, J matrices, K options of all groups together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIGITS = 9  # remainders that agree to so many are equal


def uniform_counts(sizes: Sequence[int], total: int, *, floors: Sequence[int], step: Sequence[int]) -> list[int]:
    """Drop the same fraction of every layer's experts, `total` in all.

    Layer i has `sizes[i]` experts, keeps at least `floors[i]`, and drops a multiple of `step[i]` (the number of its
    router groups, else 1). Largest remainder decides who rounds up; of equals the later layer, whose error passes
    through fewer layers. Raises ValueError where no such counts exist.
    """
    caps_L = _caps(sizes, total, floors, step)
    share_L = _fill(np.array(sizes, dtype=np.float64), np.zeros(len(sizes)), caps_L, total)
    return _whole_counts(share_L, caps_L, total, step)


def importance_counts(
    importance: Sequence[float], sizes: Sequence[int], total: int, *, floors: Sequence[int], step: Sequence[int]
) -> list[int]:
    """Drop experts in proportion to 1 / importance, so that important layers lose fewer; else as `uniform_counts`.

    What a layer at its floor cannot give, the others give in the same proportion. Layers of no importance (zero or
    less) go down to their floors before any other gives an expert; layers of infinite importance give last.
    """
    caps_L = _caps(sizes, total, floors, step)
    importance_L = np.array(importance, dtype=np.float64)
    if np.isnan(importance_L).any():
        raise ValueError(f"The importance of layer {int(np.isnan(importance_L).argmax())} is not a number.")
    with np.errstate(divide="ignore", over="ignore"):
        weight_L = 1 / np.maximum(importance_L, 0)
    first_L, last_L, size_L = np.isinf(weight_L), weight_L == 0, np.array(sizes, dtype=np.float64)
    share_L, left = np.zeros(len(sizes)), float(total)
    for tier_L, by_L in ((first_L, size_L), (~first_L & ~last_L, weight_L), (last_L, size_L)):
        given = min(left, caps_L[tier_L].sum())
        share_L[tier_L] = _fill(by_L[tier_L], np.zeros(tier_L.sum()), caps_L[tier_L], given)
        left -= given
    return _whole_counts(share_L, caps_L, total, step)


def optimal_counts(menus: Sequence[Mapping[int, float]], total: int, *, sensitivity: Sequence[float] | None = None) -> list[int]:
    """Minimise `sum_i sensitivity[i] * menus[i][n_i] ** 2` over counts with `sum_i n_i == total`.

    `menus[i]` maps each offered number of dropped experts to the layer's loss (not squared; infinite: not offered).
    Dynamic programming over the running total rather than an integer program: counts are small, so it is exact and
    needs no tolerance; 100 layers of 512 options take seconds. Raises ValueError where no choice gives `total`.
    """
    weights = [1.0] * len(menus) if sensitivity is None else sensitivity
    least_N = np.full(total + 1, np.inf)  # of the layers so far, by the number of experts they drop
    least_N[0] = 0.0
    taken_LN = np.zeros((len(menus), total + 1), dtype=np.int64)
    for menu, weight, taken_N in zip(menus, weights, taken_LN, strict=True):
        before_N, least_N = least_N, np.full(total + 1, np.inf)
        for n in sorted(menu, reverse=True):
            loss_N = before_N[: max(total + 1 - n, 0)] + weight * menu[n] ** 2
            better_N = loss_N < least_N[n:]
            least_N[n:][better_N] = loss_N[better_N]
            taken_N[n:][better_N] = n
    if not np.isfinite(least_N[total]):
        raise ValueError(f"No choice of the offered counts of {len(menus)} layers drops {total} experts in all.")
    counts = []
    for taken_N in taken_LN[::-1]:
        counts.append(int(taken_N[total]))
        total -= counts[-1]
    return counts[::-1]


def importance_ranks(
    importance_E: Sequence[float] | Floats,
    average: float,
    *,
    alpha: float = 0.15,
    multiple: int = 8,
    cap: int,
    eps: float = 1e-8,
) -> list[int]:
    """Ranks in proportion to `(importance + eps) ** alpha`, from one `multiple` to `cap`, in multiples of `multiple`.

    They sum to `average * E` rounded down to a multiple, or are all `cap`. MoE-I2 floors every rank; what that loses
    goes to the largest remainders, of equals to the first.
    """
    importance_E = np.array(importance_E, dtype=np.float64)
    if not (np.isfinite(importance_E) & (importance_E >= 0)).all():
        raise ValueError(f"Importances must be finite and not negative, not {importance_E.tolist()}.")
    ones_E = np.ones(len(importance_E))
    units = _rank_units(len(importance_E), average, multiple, cap)
    share_E = _fill((importance_E + eps) ** alpha, ones_E, ones_E * (cap // multiple), units)
    whole_E = np.floor(share_E).astype(np.int64)
    winners = np.argsort(-(share_E - whole_E).round(DIGITS), kind="stable")[: _whole(units) - whole_E.sum()]
    whole_E[winners] += 1
    return [int(u) * multiple for u in whole_E]


def uniform_ranks(num_experts: int, average: float, *, multiple: int = 8, cap: int) -> list[int]:
    """Equal ranks with the sum of `importance_ranks`; multiples left over go to the first experts."""
    each, over = divmod(_whole(_rank_units(num_experts, average, multiple, cap)), num_experts)
    return [(each + (e < over)) * multiple for e in range(num_experts)]


def _rank_units(num_experts: int, average: float, multiple: int, cap: int) -> float:
    """What all experts share, in multiples, before it is rounded down."""
    if cap < multiple or cap % multiple:
        raise ValueError(f"The largest rank {cap} must be a positive multiple of {multiple}.")
    if average < multiple:
        raise ValueError(f"An average rank of {average} is below {multiple}, the smallest rank an expert can have.")
    return min(average * num_experts / multiple, num_experts * (cap // multiple))


def _whole(units: float) -> int:
    return math.floor(units + 10.0**-DIGITS)


def _caps(sizes: Sequence[int], total: int, floors: Sequence[int], step: Sequence[int]) -> Floats:
    """The most each layer can drop."""
    caps = []
    for layer, (size, floor, by) in enumerate(zip(sizes, floors, step, strict=True)):
        if floor > size:
            raise ValueError(f"Layer {layer} has {size} experts and cannot keep {floor}.")
        caps.append((size - floor) // by * by)
    if not 0 <= total <= sum(caps):
        raise ValueError(f"Cannot drop {total} of {sum(sizes)} experts: from 0 to {sum(caps)} can go.")
    return np.array(caps, dtype=np.float64)


def _fill(weight: Floats, low: Floats, high: Floats, total: float) -> Floats:
    """Shares proportional to the weights, held between low and high, that sum to the total."""
    if not len(weight):
        return weight
    # The sum of clip(scale * weight) is piecewise linear in the scale, with these corners.
    scales = np.unique(np.concatenate([low / weight, high / weight]))
    sums = np.clip(scales[:, None] * weight, low, high).sum(1)
    filled: Floats = np.clip(np.interp(total, sums, scales) * weight, low, high)
    return filled


def _whole_counts(share_L: Floats, caps_L: Floats, total: int, step: Sequence[int]) -> list[int]:
    """Multiples of the steps nearest to the shares, by largest remainder, that sum to the total."""
    step_L = np.array(step)
    whole_L = (np.floor(share_L / step_L) * step_L).astype(np.int64)
    left = total - int(whole_L.sum())
    remainder_L = ((share_L - whole_L) / step_L).round(DIGITS)
    for layer in np.lexsort((-np.arange(len(step_L)), -remainder_L)):
        if step_L[layer] <= min(left, caps_L[layer] - whole_L[layer]):
            whole_L[layer] += step_L[layer]
            left -= int(step_L[layer])
    if left == 0:
        return [int(n) for n in whole_L]
    # Only with different steps: the counts nearest in the squared sense, which is what largest remainder gives else.
    menus = [{n: abs(n - share) for n in range(0, int(cap) + 1, by)} for share, cap, by in zip(share_L, caps_L, step, strict=True)]
    try:
        return optimal_counts(menus, total)
    except ValueError as error:
        raise ValueError(f"Cannot drop exactly {total} experts where layers drop multiples of {sorted(set(step))}.") from error
