"""Which weights of a matrix stay: by magnitude, by magnitude times their input's norm, or by SparseGPT, which also makes up for those
that go. Wanda arXiv 2306.11695, MoE-Pruner arXiv 2410.12013, SparseGPT arXiv 2301.00774.

A mask is True where a weight stays. Scores are zero or more and the lowest go, exactly as many as asked; of equal ones those that come
first in order of matrix, row and column. Nothing given is changed.

Letters: O outputs, I inputs of a matrix, S routed tokens of one expert, B columns of one lazy block, M inputs of one pattern, R rows of N.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch

from trimoe.errors import UserError
from trimoe.methods.quantize.rounding import inverse_factor

BLOCK = 128  # columns between two updates of all that follow, and over which SparseGPT shares out a ratio
CHUNK = 1024  # tokens squared at once, in float64
MOST = 64  # inputs of the longest pattern


@dataclass(frozen=True)
class Pattern:
    """n:m sparsity: `keep` weights stay in each `of` consecutive inputs."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern written as "2:4"; raises UserError."""
        match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
        pattern = cls(*map(int, match.groups())) if match else None
        if pattern is None or not 1 <= pattern.keep < pattern.of <= MOST:
            raise UserError(f'Pattern "{text}": give "n:m" (n weights stay in every m inputs) with 1 <= n < m <= {MOST}, such as "2:4".')
        return pattern

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


def dropped_of(length: int, ratio: float) -> int:
    """floor(ratio * length) of the ratio as it is written: 0.29 of 100 is 29, though 0.29 * 100 is 28.999999999999996 in floats."""
    return int(Decimal(f"{ratio:.12f}") * length)


def magnitude(w_OI: torch.Tensor) -> torch.Tensor:
    """score_OI = |w|, float32."""
    return w_OI.float().abs()


def weighted(w_OI: torch.Tensor, norm_I: torch.Tensor) -> torch.Tensor:
    """score_OI = |w| norm, float32: Wanda's with the plain norms of the inputs, MoE-Pruner's with gated ones. Norms that are all zero, of
    an expert without tokens, say nothing and leave |w|."""
    norm_I = norm_I.float()
    return magnitude(w_OI) * torch.where(norm_I.any(), norm_I, 1.0)


def input_norms(x_SI: torch.Tensor, gate_S: torch.Tensor | None = None) -> torch.Tensor:
    """norm_I = sqrt(sum over tokens of (gate x)^2), float32; the gate is 1 where none is given."""
    square_I = torch.zeros(x_SI.shape[1], dtype=torch.float64, device=x_SI.device)
    for start in range(0, len(x_SI), CHUNK):
        x = x_SI[start : start + CHUNK].double()
        if gate_S is not None:
            x = x * gate_S[start : start + CHUNK].double().unsqueeze(1)
        square_I += x.square().sum(0)
    return square_I.sqrt().float()


def keep_per_row(score_OI: torch.Tensor, ratio: float) -> torch.Tensor:
    """mask_OI: floor(ratio I) weights of each row go."""
    return ~_lowest(score_OI, dropped_of(score_OI.shape[1], ratio))


def keep_pattern(score_OI: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """mask_OI: of each `pattern.of` inputs, which must divide I, the `pattern.keep` highest stay."""
    score_RM = score_OI.unflatten(1, (-1, pattern.of)).flatten(0, 1)
    return ~_lowest(score_RM, pattern.of - pattern.keep).view(score_OI.shape)


def keep_per_layer(scores: Sequence[torch.Tensor], ratio: float) -> list[torch.Tensor]:
    """A mask for each matrix: floor(ratio * all) weights go, wherever the lowest scores are.

    Non-negative floats are ordered as their bits are, so 31 counts find the highest score that goes: nothing is sorted, put together or
    waited for.
    """
    bits = [score.float().view(torch.int32) for score in scores]
    count = dropped_of(sum(part.numel() for part in bits), ratio)
    last = torch.zeros((), dtype=torch.int32, device=bits[0].device)
    for bit in reversed(range(31)):
        trial = last | (1 << bit)
        last = torch.where(sum(((part < trial).count_nonzero() for part in bits), last.new_zeros(())) < count, trial, last)
    ties = count - sum(((part < last).count_nonzero() for part in bits), last.new_zeros((), dtype=torch.int64))
    masks = []
    for part in bits:
        tied = part == last
        rank = tied.flatten().cumsum(0).view(tied.shape)
        masks.append((part > last) | (tied & (rank > ties)))
        ties = ties - tied.count_nonzero()
    return masks


def sparsegpt(
    w_OI: torch.Tensor, moment_II: torch.Tensor, *, ratio: float | None = None, pattern: Pattern | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(new_w_OI float32 with zeros where the mask is False, mask_OI): columns lose weights one after the other, and the columns that
    follow make up for each one's error.

    A weight's score is w^2 / (U's diagonal)^2, the error that its loss leaves: by ratio floor(ratio * all) weights of every block of
    columns go, from whichever rows; by pattern each group of inputs, which must divide I, is decided when its first column comes up.
    Inputs that never fire lose their weights first and count as lost only where the mask says so; where none fires, all inputs are taken
    as equal. `moment_II` may have any scale. Works in float32 and waits once for the device.
    """
    if (ratio is None) == (pattern is None):
        raise ValueError("sparsegpt wants one of ratio and pattern")
    upper_II = inverse_factor(moment_II)
    own_I, fires_I = upper_II.diagonal(), moment_II.diagonal() != 0
    # Transposed: a column of W is what is worked on, and rows are contiguous.
    w_IO = w_OI.float().T.clone(memory_format=torch.contiguous_format)
    w_IO.masked_fill_((~fires_I & fires_I.any()).unsqueeze(1), 0)
    keep_IO = torch.ones_like(w_IO, dtype=torch.bool)
    inputs, block = len(w_IO), BLOCK // pattern.of * pattern.of if pattern else BLOCK

    def scores(start: int, end: int) -> torch.Tensor:
        # Not squared: the order is the same, and small weights do not vanish.
        return (w_IO[start:end] / own_I[start:end].unsqueeze(1)).abs().T

    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        if ratio is not None:
            keep_IO[start:end] = keep_per_layer([scores(start, end)], ratio)[0].T
        error_BO = torch.empty_like(w_IO[start:end])
        for i in range(start, end):
            if pattern and (i - start) % pattern.of == 0:
                keep_IO[i : i + pattern.of] = keep_pattern(scores(i, min(i + pattern.of, end)), pattern).T
            error_BO[i - start] = (w_IO[i] / own_I[i]).masked_fill(keep_IO[i], 0)
            w_IO[i + 1 : end].addr_(upper_II[i, i + 1 : end], error_BO[i - start], alpha=-1)
            w_IO[i].masked_fill_(~keep_IO[i], 0)
        w_IO[end:].addmm_(upper_II[start:end, end:].T, error_BO, alpha=-1)
    return w_IO.T.contiguous(), keep_IO.T.contiguous()


def _lowest(score_RN: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` lowest of each row, the earlier of equal ones first."""
    order_RN = score_RN.argsort(dim=1, stable=True)
    return torch.zeros(score_RN.shape, dtype=torch.bool, device=score_RN.device).scatter_(1, order_RN[:, :count], True)
