"""What training holds in memory, counted from shapes: for `plan`, for the check before work, and for the choice of what is computed twice."""

from __future__ import annotations

import math

import torch

from trimoe.recover.spec import Recover
from trimoe.skeleton import LOGITS, Skeleton

TOKENS = 4096  # that go through a model at once, at most, if more than one sample does
SMALL = 256 << 20  # bytes that layers may keep for the backward pass in any case
SHARE = 8  # beyond that, no more than one part in so many of the model


def samples_at_once(length: int, vocabulary: int) -> int:
    """Return how many samples go through a model together: those whose logits are few, or TOKENS of them."""
    return max(1, LOGITS // (length * vocabulary), TOKENS // length)


def weights(skeleton: Skeleton) -> int:
    """Return how many numbers a model's tensors hold, dense."""
    return sum(math.prod(info.shape) for info in skeleton.checkpoint.tensors.values())


def kept_by_layer(skeleton: Skeleton, tokens: int, item: int) -> int:
    """Return the bytes that one decoder layer keeps of `tokens` tokens for its backward pass, about."""
    site = max(skeleton.sites.values(), key=lambda site: site.rule.top_k * (site.first + site.width))
    each = 14 * site.hidden + site.rule.top_k * (4 * site.hidden + 2 * site.first + 2 * site.width)
    return tokens * item * each


def batch_tokens(skeleton: Skeleton, spec: Recover) -> int:
    """Return how many tokens go through the model at once."""
    length = min(spec.length, skeleton.context)
    return length * min(spec.batch, samples_at_once(length, skeleton.config.get_text_config().vocab_size))


def computed_again(skeleton: Skeleton, spec: Recover, dtype: torch.dtype, numbers: int) -> bool:
    """Return whether layers keep only what they are called with: `numbers` of weights would else not weigh much more than what is kept."""
    kept = len(skeleton.layers) * kept_by_layer(skeleton, batch_tokens(skeleton, spec), dtype.itemsize)
    return kept > max(SMALL, numbers * dtype.itemsize // SHARE)
