"""95 % intervals by bootstrap: whole documents are drawn again with replacement, for both models the same ones, so that what a text's
documents have in common does not make a small difference look sure, nor a sure one look small.

Letters: U units (documents, or windows of a text that has too few of them), R resamples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

RESAMPLES = 1000
SEED = 0
LEVEL = (2.5, 97.5)  # percentiles
FEW = 10  # documents; with fewer, resampling them says little
HELD = 1 << 24  # draws held at once


def units(document_N: torch.Tensor) -> tuple[np.ndarray, str]:
    """The unit of each window [N], numbered from 0, and what it is: "documents", or "windows" where there are fewer than FEW documents.

    Windows of one document are not independent: intervals over them are somewhat too narrow.
    """
    _, unit_N = np.unique(document_N.numpy(), return_inverse=True)
    if unit_N.max() + 1 >= FEW:
        return unit_N, "documents"
    return np.arange(len(unit_N)), "windows"


def resampled(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums per unit [U] -> sums over each resample [R], float64; every value on the same resamples."""
    stacked_UV = np.stack([np.asarray(value, np.float64) for value in values.values()], axis=1)
    count = len(stacked_UV)
    generator = np.random.default_rng(SEED)
    parts, left = [], RESAMPLES
    while left:
        rows = min(left, max(1, HELD // count))
        times_RU = generator.multinomial(count, np.full(count, 1 / count), size=rows)
        parts.append(times_RU @ stacked_UV)
        left -= rows
    return dict(zip(values, np.concatenate(parts).T, strict=True))


def _exp(nll_R: np.ndarray) -> np.ndarray:
    """Of nats per token, as far as a float64 holds it."""
    return np.exp(np.minimum(nll_R, 700.0))


def of_text(sums: dict[str, torch.Tensor], document_N: torch.Tensor) -> dict[str, Any]:
    """For a text's row: "intervals", a [low, high] for each number (None where the text is a single window), and "resampled".

    `sums` are those of each window, float64 [N]: tokens, nll and, against an original, against_nll, kl and agreement.
    "difference_log_perplexity" is log perplexity minus that of the original, on the same resamples.
    """
    unit_N, what = units(document_N)
    count = int(unit_N.max()) + 1
    if count < 2:
        return {"resampled": what, "intervals": None}
    drawn = resampled({name: np.bincount(unit_N, value.numpy(), minlength=count) for name, value in sums.items()})
    tokens_R = drawn["tokens"]
    found = {"perplexity": _exp(drawn["nll"] / tokens_R)}
    if "kl" in drawn:
        found |= {
            "against_perplexity": _exp(drawn["against_nll"] / tokens_R), "kl": drawn["kl"] / tokens_R,
            "agreement": drawn["agreement"] / tokens_R, "difference_log_perplexity": (drawn["nll"] - drawn["against_nll"]) / tokens_R,
        }  # fmt: skip
    return {"resampled": what, "intervals": {name: [float(end) for end in np.percentile(value, LEVEL)] for name, value in found.items()}}
