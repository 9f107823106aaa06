"""Logits of a model that trains, in pieces of positions: a large vocabulary times a long text would take more than the model does.

Letters: B samples, L tokens of a sample, P positions of a piece, V tokens of the vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import MoeModelOutputWithPast

from trimoe.model.skeleton import LOGITS

Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits [B, P, V], positions [P]) -> mean over them


class Logits:
    """The logits of some samples. Where there are more than LOGITS the model runs up to its last hidden states, and of each piece of
    positions the logits are made when they are asked for, and made again in the backward pass."""

    def __init__(self, model: Any, ids_BL: torch.Tensor):
        self.ids_BL = ids_BL
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.share = max(1, LOGITS // (len(ids_BL) * self.causal.config.get_text_config().vocab_size))
        self.whole = self.share >= ids_BL.shape[1]
        self.found = (
            model(input_ids=ids_BL, use_cache=False).logits
            if self.whole
            else self.causal.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        )

    def mean(self, length: int, part: Part) -> torch.Tensor:
        """The mean over the first `length` positions of what `part` says of each."""
        places = torch.arange(length, device=self.ids_BL.device)
        if self.whole:
            return part(self.found[:, :length], places)
        total = self.found.new_zeros((), dtype=torch.float32)
        for start in range(0, length, self.share):
            at = places[start : start + self.share]
            hidden_BPH = self.found[:, start : start + len(at)]
            if torch.is_grad_enabled():
                found: Any = checkpoint(self._of, hidden_BPH, at, part, use_reentrant=False, preserve_rng_state=False)
            else:
                found = self._of(hidden_BPH, at, part)
            total = total + found * (len(at) / length)
        return total

    def _of(self, hidden_BPH: torch.Tensor, at: torch.Tensor, part: Part) -> torch.Tensor:
        with _answering(self.causal.base_model, hidden_BPH):
            return part(self.causal(input_ids=self.ids_BL[:, at], use_cache=False).logits, at)


@contextmanager
def _answering(decoder: Any, hidden_BPH: torch.Tensor) -> Iterator[None]:
    """Let the decoder answer with these hidden states, so that the stock head and whatever scaling follows run on them."""
    decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=hidden_BPH)
    try:
        yield
    finally:
        del decoder.forward
