"""What training holds in memory, counted from shapes: for `plan`, for the check before work, and for the choice of what is computed twice."""

from __future__ import annotations

import math

import torch

from trimoe.checkpoint.headers import DTYPES
from trimoe.model.skeleton import LOGITS, Skeleton
from trimoe.plan import disk
from trimoe.recipe.recover import Recover
from trimoe.walk.hidden_states import BUDGET

TOKENS = 4096  # that go through a model at once, at most, if more than one sample does
SMALL = 64 << 20  # bytes that layers may keep for the backward pass in any case
STATE = 16  # bytes of a number that trains: itself, its gradient, two moments, in float32
LAYERS = 5  # a layer that learns, its gradients, two moments and its best state
TABLES = 5  # of logits, in float32, that are held at once
MERGED = 12  # bytes of a number that an adapter is added to: as read, in float32, and as stored
READ = 8  # those of the host, where the adapter is on another device: as read, and in float32
SHARE = 16  # beyond that, no more than one part in so many of the model


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


def can_stream(skeleton: Skeleton, spec: Recover) -> bool:
    """Return whether the model can be trained with its frozen weights left in their files: some must be frozen, and none packed."""
    return spec.method != "experts" and not spec.whole and skeleton.checkpoint.scheme is None


def peak(skeleton: Skeleton, spec: Recover, device: str, *, parameters: int, original: int, streamed: bool = False) -> tuple[int, int, int]:
    """Return the bytes that training takes at its peak where it computes, beside that on the host, and on the host while a model
    for another device is loaded. `parameters` of the model that is trained, which `skeleton` is, or was made into; `original`:
    those of what it was made from; `streamed`: layers are read as they run."""
    dtype = precision(spec, skeleton, device)
    tokens = batch_tokens(skeleton, spec)
    logits = 4 * TABLES * min(LOGITS, tokens * skeleton.config.get_text_config().vocab_size)
    again = computed_again(skeleton, spec, dtype, parameters)
    kept = kept_by_layer(skeleton, tokens, dtype.itemsize)
    hidden = tokens * max(site.hidden for site in skeleton.sites.values()) * dtype.itemsize
    # beside what one layer keeps lie the gradients of it
    activations = 2 * kept + len(skeleton.layers) * hidden if again else (len(skeleton.layers) + 1) * kept
    if spec.by_layer:
        layer = skeleton.largest_layer // skeleton.dtype.itemsize
        seen = spec.samples * min(spec.length, skeleton.context) * hidden // max(1, tokens)
        return layer * (4 * LAYERS + dtype.itemsize) + 2 * min(seen, BUDGET) + kept, 0, layer * 4
    trained = disk.trained(skeleton, spec)
    if spec.method != "router":
        trained = int(trained * min(1.0, parameters / weights(skeleton)))
    masters = spec.method in ("router", "experts") or spec.whole
    each = STATE + (2 if masters and dtype != torch.float32 else 0)
    models = parameters + (original if spec.method == "experts" else 0)
    if streamed:
        return _streamed(skeleton, spec, dtype.itemsize, min(1.0, parameters / weights(skeleton)), trained * each, kept, hidden, logits)
    frozen = models - (trained if masters else 0)
    body = _frozen(skeleton, frozen, dtype.itemsize) + trained * each + activations + logits
    return body, 0, _frozen(skeleton, parameters, dtype.itemsize)


def _streamed(
    skeleton: Skeleton, spec: Recover, item: int, share: float, learning: int, kept: int, hidden: int, logits: int
) -> tuple[int, int, int]:
    """Return the same as `peak` where layers are read as they run; `share` of them is left in the model that is trained. What lies
    outside the layers stays, and one layer is there at a time. At the end adapters are added to one stack after the other in
    float32, which is read, summed, and made into what is stored."""
    tensors = skeleton.checkpoint.tensors
    outside = sum(math.prod(tensors[key].shape) for key in skeleton.outer_keys) * item
    layer = int(share * (skeleton.largest_layer // skeleton.dtype.itemsize))
    stack = max(tensor.numel() for module in skeleton.layers for tensor in module.parameters())
    training = layer * item + 2 * kept + len(skeleton.layers) * hidden + logits
    merged = 0 if spec.method == "router" or spec.adapter else int(share * stack)
    return outside + learning + max(training, merged * MERGED), 0, max(layer * item, merged * READ)


def _frozen(skeleton: Skeleton, numbers: int, item: int) -> int:
    """Return the bytes of so many weights that do not train: packed matrices stay as they are stored, and one layer's are dense at a time."""
    if skeleton.checkpoint.scheme is None:
        return numbers * item
    stored = skeleton.checkpoint.stored.values()
    held = sum(math.prod(info.shape) * item if DTYPES[info.dtype].is_floating_point else info.nbytes for info in stored)
    return held + skeleton.largest_layer // skeleton.dtype.itemsize * item


def precision(spec: Recover, skeleton: Skeleton, device: str) -> torch.dtype:
    """Return the dtype that the model computes in."""
    if spec.dtype is not None:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.dtype]
    narrow = {DTYPES[info.dtype] for info in skeleton.checkpoint.tensors.values() if len(info.shape) > 1} == {torch.bfloat16}
    return torch.bfloat16 if narrow and torch.device(device).type == "cuda" else torch.float32


def computed_again(skeleton: Skeleton, spec: Recover, dtype: torch.dtype, numbers: int) -> bool:
    """Return whether layers keep only what they are called with: `numbers` of weights would else not weigh much more than what is kept."""
    kept = len(skeleton.layers) * kept_by_layer(skeleton, batch_tokens(skeleton, spec), dtype.itemsize)
    return kept > max(SMALL, numbers * dtype.itemsize // SHARE)
