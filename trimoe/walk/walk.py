"""The layer walk, written once: any model, one decoder layer in memory at a time.

Weights come from the checkpoint through transformers' own loader; masks, rope tables and everything else a layer is called with come
from one weightless pass in which every decoder layer is a probe that returns its input. Peak memory is a layer (twice one, where its
experts cannot be filled in place) plus the hidden states.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError, first_line
from trimoe.model import transformers5
from trimoe.model.layer_call import Call, Stand, same, standing, with_passed
from trimoe.model.skeleton import LOGITS, Skeleton
from trimoe.progress import Reporter
from trimoe.text.documents import unmarked
from trimoe.walk.attention_mask import apart, narrowed
from trimoe.walk.finite import Inside, NotFinite, Range
from trimoe.walk.hidden_states import HiddenStates, wider

ROWS = 8192  # of the head's weights that are in float32 at once


def usable_device(device: str) -> torch.device:
    """The device, or UserError if this machine cannot use it."""
    try:
        torch.ones(1, device=device, dtype=torch.float64).sum().item()  # double precision is needed, which not every device has
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"The device {device!r} cannot be used here ({first_line(error)}).") from None


def check_device(device: str) -> None:
    """Raise UserError for a word that names no device; one that is not in this machine may be planned for."""
    try:
        torch.device(device)
    except RuntimeError:
        raise UserError(f"The device {device!r} is not known; cpu, cuda, cuda:1 ... are.") from None


class _Blank(nn.Module):
    """In an embedding table's place: zeros of the hidden size; in the head's: nothing but a token's first number."""

    def __init__(self, dtype: torch.dtype, hidden: int | None):
        super().__init__()
        self.dtype, self.hidden = dtype, hidden
        self.weight = torch.empty(0, dtype=dtype)  # some models ask for its dtype

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return given[..., :1] if self.hidden is None else torch.zeros(*given.shape, self.hidden, dtype=self.dtype, device=given.device)


class LayerWalk:
    """Runs token batches through a checkpoint, layer by layer.

    `batches` are int64 [B, L] without padding; tokens that carry a mark begin a document that does not see what stands before it
    (documents.py). `hidden[b]` holds each batch's current hidden states [B, L, H] in the skeleton's dtype; beyond a
    budget they lie in a mapped file (hidden_states.py). While one layer runs, the system is asked to read the next one's bytes ahead.
    """

    def __init__(self, skeleton: Skeleton, batches: Sequence[torch.Tensor], *, device: str | torch.device = "cpu"):
        self.skeleton, self.model, self.device = skeleton, skeleton.model, torch.device(device)
        unpacked = [unmarked(batch.to(self.device)) for batch in batches]
        self.batches = [ids for ids, _ in unpacked]
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        self.calls: list[list[Call]] = []
        self.hidden, self.range = HiddenStates(), Range(skeleton.name, skeleton.dtype)
        with self._outer("head"), torch.no_grad():
            for batch, positions in unpacked:
                first, calls = self._capture(batch, positions)
                self.range.see(first)
                self.hidden.append(first)
                self.calls.append(self.calls[-1] if self.calls and same(calls, self.calls[-1]) else calls)
        self.range.check("the hidden states before layer 0")

    # ---- weights in, weights out

    @contextmanager
    def _outer(self, without: Literal["embeddings", "head"]) -> Iterator[None]:
        """What lies outside the layers in memory, but for the one of two large tables that is not needed: a stub stands in for it. Where
        head and embeddings are one table, it is there."""
        checkpoint, model = self.skeleton.checkpoint, self.model
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        left_out, put = (table, model.set_input_embeddings) if without == "embeddings" else (head, model.set_output_embeddings)
        shared = {*self.skeleton.ties, *self.skeleton.ties.values()}
        names = {f"{name}.weight" for name, module in model.named_modules() if module is left_out} - shared
        apart = head is not None and bool(names)
        keys = {key for name in names for key in self.skeleton.source_keys(name)}
        for key in self.skeleton.outer_keys:
            if key not in keys:
                self._put({key: checkpoint.read(key)})
        if apart:
            put(_Blank(self.skeleton.dtype, table.weight.shape[1] if left_out is table else None))
        else:
            self.skeleton.tie()
        try:
            yield
        finally:
            if apart:
                put(left_out)
            _to_meta(model)
            give_back()

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        transformers5.load_into(self.model, tensors, self.device, self.skeleton.dtype)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights; a copy that may be changed freely and is gone afterwards. Raises UserError where hidden
        states did not stay finite in it."""
        layers, pristine = self.skeleton.layers, self.skeleton.layers[index]
        layers[index] = own = deepcopy(pristine)
        try:
            self._load(index)
            if index + 1 < len(layers):
                _ask_ahead(self.skeleton.checkpoint, self.skeleton.keys_by_layer[index + 1])
            yield own
            self.check(index)
        except Inside as error:
            raise NotFinite(f"{self.skeleton.name}, layer {index}: {error}") from None
        finally:
            layers[index] = pristine
            _to_meta(own)  # whoever still holds the module holds no weights
            give_back()

    def _load(self, index: int) -> None:
        """A layer's weights. Stacked expert tensors are filled in place; where transformers makes them in another way, one at a time, for
        that takes a tensor's memory three times over."""
        skeleton, checkpoint = self.skeleton, self.skeleton.checkpoint
        prefix, site = skeleton.layer_name(index) + ".", skeleton.sites.get(index)
        paths = [] if site is None else [f"{prefix}{site.block}.{path}" for path in site.weight_paths()]
        names = [name for name in skeleton.conversion.stacked if name.startswith(prefix)]
        apart = [keys for name in paths if name not in names and (keys := skeleton.source_keys(name))]
        taken = {key for keys in (*apart, *map(skeleton.source_keys, names)) for key in keys}
        for keys in ([key for key in skeleton.keys_by_layer[index] if key not in taken], *apart):
            self._put(checkpoint.read_together(keys))
        for name in names:
            transformers5.stack_into(self.model, name, skeleton.conversion.stacked[name], checkpoint.read_into, self.device)

    # ---- calls

    def _capture(self, batch: torch.Tensor, positions: torch.Tensor | None) -> tuple[torch.Tensor, list[Call]]:
        packed = {} if positions is None else {"position_ids": positions}
        stands = [Stand(layer, beside=self.skeleton.passed_on) for layer in self.skeleton.layers]
        with standing(self.skeleton.layers, stands):
            self.model(input_ids=batch, use_cache=False, logits_to_keep=1, **packed)
        calls = [stand.call for stand in stands]
        if positions is not None:
            own_BL = (positions == 0).cumsum(1)
            same_BLL = (own_BL.unsqueeze(2) == own_BL.unsqueeze(1)).unsqueeze(1)
            made: dict[int, torch.Tensor] = {}
            calls = [narrowed(call, same_BLL, made) for call in calls]
            if (mixed := next((i for i, call in enumerate(calls) if not apart(call, positions)), None)) is not None:
                raise UserError(
                    f"packing: separate is not possible with {self.skeleton.name}: layer {mixed} takes no mask that keeps documents apart "
                    "(recurrent layers and convolutions take none); leave packing at joined."
                )
        return stands[0].seen, calls

    @torch.no_grad()
    def step(self, index: int, layer: nn.Module, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """One batch's hidden states through one layer, called as the stock model calls it. What a layer hands on beside them hangs on
        them as the attribute `beside`."""
        args, kwargs = with_passed(self.calls[batch][index], getattr(hidden, "beside", ()))
        out = layer(hidden, *args, **kwargs)
        out, *rest = out if isinstance(out, tuple) else (out,)
        if self.skeleton.passed_on:
            out.beside = rest
        self.range.see(out)
        return out

    def check(self, index: int) -> None:
        """Raises UserError where the hidden states that layer `index` gave are not finite: before anything is made of them."""
        self.range.check(f"the hidden states after layer {index}")

    def advance(self, index: int, layer: nn.Module) -> None:
        """All batches through one layer."""
        for batch in range(len(self.batches)):
            self.hidden[batch] = self.step(index, layer, self.hidden[batch], batch)
        self.check(index)

    def run(self, label: str, reporter: Reporter) -> None:
        """All batches through all layers."""
        for index in reporter.track(range(len(self)), label, len(self), tokens=self.share):
            with self.layer(index) as layer:
                self.advance(index, layer)

    def __len__(self) -> int:
        return len(self.skeleton.layers)

    @property
    def share(self) -> float:
        """Tokens that have gone through the model, for one layer that they went through: for progress."""
        return sum(batch.numel() for batch in self.batches) / len(self)

    # ---- the end of the model

    def pieces(self, batch: int) -> list[torch.Tensor]:
        """Positions of a batch in pieces whose logits are few enough to be held several times over."""
        rows, length = self.batches[batch].shape
        vocabulary = self.skeleton.config.get_text_config().vocab_size
        return list(torch.arange(length, device=self.device).split(max(1, LOGITS * wider(self.device) // (rows * vocabulary))))

    @contextmanager
    def head(self) -> Iterator[Callable[..., torch.Tensor]]:
        """A function (hidden, batch index, positions or None for all) -> logits [B, positions, vocabulary]: the stock final norm, head (its
        products in float32) and whatever scaling follows. Raises UserError at the end where any were not finite."""
        last = len(self.skeleton.layers) - 1

        @torch.no_grad()
        def logits(hidden: torch.Tensor, batch: int, positions: torch.Tensor | None = None) -> torch.Tensor:
            layers, beside = self.skeleton.layers, self.skeleton.passed_on
            stands = [Stand(layer, hidden if index == last else None, beside) for index, layer in enumerate(layers)]
            wanted = 0 if positions is None or len(positions) == hidden.shape[1] else positions
            with standing(layers, stands):
                made = self.model(input_ids=self.batches[batch], use_cache=False, logits_to_keep=wanted).logits
            self.range.see(made)
            return made

        with self._outer("embeddings"), exact_logits(self.model):
            yield logits
            self.range.check("the logits")


@contextmanager
def exact_logits(model: Any) -> Iterator[None]:
    """The head's products in float32 whatever its weights are in: logits of 16 bits are rounded by more than small errors move them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.weight.dtype == torch.float32:
        yield
        return

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = torch.cat([x.float() @ rows.float().T for rows in head.weight.split(ROWS)], -1)
        return logits if head.bias is None else logits + head.bias.float()

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def _ask_ahead(checkpoint: Checkpoint, keys: Sequence[str]) -> None:
    """Let the system read these tensors' bytes while this process computes: into its own page cache, which gives way where memory is short."""
    if not hasattr(os, "posix_fadvise"):
        return
    found = [checkpoint.stored[key] for key in keys if key in checkpoint.stored]
    for name in {info.file for info in found}:
        with open(checkpoint.folder / name, "rb") as file:
            for info in found:
                if info.file == name:
                    os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)


def give_back() -> None:
    """Hand freed memory back to the system where the C library would keep it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _to_meta(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
