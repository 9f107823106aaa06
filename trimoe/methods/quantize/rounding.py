"""Weights rounded to 4 or 8 bits in groups: to the nearest, by GPTQ, or with AWQ's scales and clipping. GPTQ arXiv 2210.17323, AWQ
arXiv 2306.00978.

Everything is symmetric (value = integer * its group's scale) because that is what loads everywhere, and the groups are fixed runs of
inputs, so that nothing but integers and scales is stored. Errors count as a linear layer's user sees them: tr(D C D^T), D = W - W' and
C = E[x x^T] the second moment of the inputs.

Letters: O outputs, I inputs of a matrix, G groups along I, B columns of one lazy block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trimoe.checkpoint.packed import Packed

BLOCK = 128  # columns between two updates of all that follow (GPTQ's lazy batches)
DAMP = 0.01  # of the mean diagonal, added to the moment's diagonal (GPTQ's)
SHRINK = tuple(1 - step / 20 for step in range(11))  # of a group's range, tried for clipping; 1 comes first and wins ties
ALPHAS = tuple(step / 20 for step in range(20))  # exponents tried for AWQ's scale; 0 is no scale


def common_group(widths: Iterable[int], wanted: int) -> int:
    """The largest number of inputs, at most `wanted`, that divides every width."""
    common = math.gcd(*widths)
    return next(group for group in range(min(wanted, common), 0, -1) if common % group == 0)


def rounded(w_OI: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """Each weight to the nearest multiple of its group's scale, which maps the group's largest magnitude half a step past the last
    integer. The scale is rounded to `dtype` first, so the integers are the best for the scale that is stored."""
    w = w_OI.float()
    return _packed(w, _scales(w, bits, group, dtype), bits, group)


def clipped(w_OI: torch.Tensor, moment_II: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """`rounded` with every group's range shrunk by the factor of `SHRINK` that has the least error weighted by the moment's diagonal."""
    w = w_OI.float()
    return _packed(w, _searched_scales(w, moment_II.diagonal(), bits, group, dtype), bits, group)


def gptq(w_OI: torch.Tensor, moment_II: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> Packed:
    """Columns in order of decreasing diagonal are rounded one after the other; the columns that follow make up for each one's error.

    The scales are chosen beforehand, from the original weights, so that groups stay runs of inputs whatever the order: clipped under the
    share of each input's variance that the later columns cannot make up for (at 4 bits, 16 to 26 % less error on made-up correlated
    inputs). An input that never fires is rounded alone: damping keeps it apart. Works in float32 and waits once for the device.
    """
    order_I = moment_II.diagonal().argsort(descending=True, stable=True)
    upper_II = inverse_factor(moment_II[order_I][:, order_I])
    own_I = torch.empty_like(upper_II[0])
    own_I[order_I] = upper_II.diagonal() ** -2
    scale_OG = _searched_scales(w_OI.float(), own_I, bits, group, dtype)
    # Transposed: a column of W is what is worked on, and rows are contiguous.
    w_IO = w_OI.float().T[order_I].contiguous()
    scale_IO = scale_OG.float().T.repeat_interleave(group, dim=0)[order_I]
    q_IO = torch.empty_like(w_IO, dtype=torch.int8)
    inputs = len(w_IO)
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        error_BO = torch.empty_like(w_IO[start:end])
        for i in range(start, end):
            q_O = _integers(w_IO[i], scale_IO[i], bits)
            error_BO[i - start] = (w_IO[i] - (q_O * scale_IO[i]).to(dtype)) / upper_II[i, i]
            w_IO[i + 1 : end].addr_(upper_II[i, i + 1 : end], error_BO[i - start], alpha=-1)
            q_IO[i] = q_O
        w_IO[end:].addmm_(upper_II[start:end, end:].T, error_BO, alpha=-1)
    q_OI = torch.empty_like(q_IO)
    q_OI[order_I] = q_IO
    return Packed(q_OI.T.contiguous(), scale_OG, bits, group)


def awq_scale(w_OI: torch.Tensor, moment_II: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """s_I float32: the scale of each input under which W' = Q(W diag(s)) diag(1/s) has the least error tr(D C D^T).

    s = rms(x)^alpha with alpha of `ALPHAS`, normalised so that its largest and smallest values are each other's inverse.
    """
    w = w_OI.float()
    rms_I = moment_II.diagonal().clamp_min(0).sqrt()
    rms_I = (rms_I / rms_I.mean().clamp_min(1e-30)).clamp_min(1e-4).float()
    best, best_I = torch.full((), torch.inf, device=w.device), torch.ones_like(rms_I)
    for alpha in ALPHAS:
        s_I = rms_I**alpha
        s_I = s_I / (s_I.max() * s_I.min()).sqrt()
        error = weighted_error(w, rounded(w * s_I, bits, group, dtype).dense().float() / s_I, moment_II)
        best_I = torch.where(error < best, s_I, best_I)
        best = torch.minimum(best, error)
    return best_I


def weighted_error(w_OI: torch.Tensor, other_OI: torch.Tensor, moment_II: torch.Tensor) -> torch.Tensor:
    """tr(D C D^T), D = w - other: the mean squared error of the outputs, summed over outputs. A float32 scalar on the device."""
    difference = w_OI.float() - other_OI.float()
    return ((difference @ moment_II.float()) * difference).sum()


def _packed(w_OI: torch.Tensor, scale_OG: torch.Tensor, bits: int, group: int) -> Packed:
    grouped = _integers(w_OI.unflatten(1, (-1, group)), scale_OG.float().unsqueeze(-1), bits)
    return Packed(grouped.flatten(1).to(torch.int8).contiguous(), scale_OG, bits, group)


def _integers(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest integers in range, as floats."""
    return (w / scale).round_().clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _scales(w_OI: torch.Tensor, bits: int, group: int, dtype: torch.dtype, shrink: float = 1.0) -> torch.Tensor:
    """scale_OG in `dtype`: finite weights give finite scales above zero."""
    limits = torch.finfo(dtype)
    scale_OG = w_OI.unflatten(1, (-1, group)).abs().amax(-1) * (shrink / ((1 << (bits - 1)) - 0.5))
    # Down to float16's subnormals: they are real scales of small weights. 1e-30 keeps w / scale finite in float32.
    return scale_OG.clamp(max(limits.smallest_normal * limits.eps, 1e-30), limits.max).to(dtype)


def _searched_scales(w_OI: torch.Tensor, weight_I: torch.Tensor, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The scales [O, G] whose rounding has the least sum of weight_I (w - w')^2 in each group."""
    weight_I = weight_I.float()
    best_OG = scale_OG = _scales(w_OI, bits, group, dtype)
    least_OG = torch.full(scale_OG.shape, torch.inf, device=w_OI.device)
    for factor in SHRINK:
        scale_OG = _scales(w_OI, bits, group, dtype, factor)
        difference = _packed(w_OI, scale_OG, bits, group).dense().float().sub_(w_OI)
        error_OG = difference.square_().mul_(weight_I).unflatten(1, (-1, group)).sum(-1)
        best_OG = torch.where(error_OG < least_OG, scale_OG, best_OG)
        least_OG = torch.minimum(error_OG, least_OG)
    return best_OG


def inverse_factor(moment_II: torch.Tensor) -> torch.Tensor:
    """Upper triangular U with U^T U = (C + damping)^-1 in float32, whose rows tell how each column's error spreads over the next.

    C turned end for end is L L^T; L turned back is upper triangular and U is its inverse: one factorisation instead of GPTQ's two.
    """
    moment = moment_II.double()
    moment = moment / moment.diagonal().mean().clamp_min(1e-300)
    moment.diagonal().add_(DAMP)
    turned = moment.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(turned.float())
    if failed:
        lower = torch.linalg.cholesky(turned)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float()
