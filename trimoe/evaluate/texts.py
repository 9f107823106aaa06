"""Texts: strided perplexity, and KL and top-1 agreement against the original; and what the routing would send under expert parallelism
(walk/expert_parallel.py). Both models are streamed layer by layer: neither has to fit in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimoe.errors import UserError
from trimoe.evaluate import intervals
from trimoe.evaluate.cache import ResultCache, digest, identity
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.text.samples import encode, opening, read_text
from trimoe.walk.expert_parallel import ITEMSIZE, WAYS, Traffic
from trimoe.walk.walk import LayerWalk

BATCH_TOKENS = 4096
LARGEST = 700.0  # nats per token whose exponential a float64 still holds
End = tuple[LayerWalk, Traffic]  # a walk that has gone through all layers, and what was sent on the way


@dataclass(frozen=True)
class Windows:
    """Strided windows over the documents of one text. `ids_NL` int64, right-padded with 0 (which a causal model's earlier positions
    cannot see); `scored_NL`: the positions whose *next* token counts, each token of a document once; `document_N` numbers them."""

    name: str
    ids_NL: torch.Tensor
    scored_NL: torch.Tensor
    document_N: torch.Tensor


def windows(name: str, documents: Sequence[torch.Tensor], length: int, stride: int, tokens: int, first: tuple[int, ...] = ()) -> Windows:
    """Windows of `length` text tokens that advance by `stride`: after a document's first window, only the last `stride` tokens of each are
    scored, so that every token has at least length - stride tokens of context. `first` stands before every window, is never scored, and
    does not count as text. Stops after about `tokens` scored tokens."""
    ids, scored, owner, count, before = [], [], [], 0, len(first)
    for number, row in enumerate(documents):
        start = done = 0
        while done < len(row) - 1 and count < tokens:
            end = min(start + length, len(row))
            window = torch.zeros(before + length, dtype=torch.int64)
            window[:before] = torch.tensor(first, dtype=torch.int64)
            window[before : before + end - start] = row[start:end]
            mask = torch.zeros(before + length, dtype=torch.bool)
            mask[before + done - start : before + end - start - 1] = True  # position p scores token p + 1
            ids.append(window)
            scored.append(mask)
            owner.append(number)
            count += int(mask.sum())
            done = end - 1
            start = min(start + stride, done)  # the next window must see the token before the first that it scores
    if not ids:
        raise UserError(f"The text {name!r} has no document of at least 2 tokens; nothing can be evaluated on it.")
    return Windows(name, torch.stack(ids), torch.stack(scored), torch.tensor(owner))


def of_sources(skeleton: Skeleton, tokenizer: Any, sources: Sequence[str], length: int, stride: int | None, tokens: int) -> list[Windows]:
    """Windows over every text of `sources`, as this model reads them. Raises UserError for a text that is not there, or too short."""
    first = opening(tokenizer)
    length, stride = sizes(skeleton, length, stride, len(first))
    vocabulary = skeleton.config.get_text_config().vocab_size
    parts = [part for source in sources for part in read_text(source, "eval", tokens=tokens)]
    names = [part.domain for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"Two texts to evaluate on are called {twice!r}; give each once, and files of one name others (name=path).")
    return [windows(part.domain, encode(tokenizer, part, vocabulary), length, stride, tokens, first) for part in parts]


def sizes(skeleton: Skeleton, length: int, stride: int | None, first: int = 0) -> tuple[int, int]:
    """A window's length, cut to what the model's context holds beside the `first` tokens that open it, and its stride: half of it where none
    is given."""
    room = skeleton.context - first
    if room < 2:
        raise UserError(f"The tokenizer begins every text with {first} tokens, which fill the model's context of {skeleton.context}.")
    length = min(length, room)
    return length, min(stride or max(1, length // 2), length)


class Ends:
    """The original's walk at its end, exactly as it was, in temporary files: for the next model that is compared with it on the same windows."""

    def __init__(self) -> None:
        self._key = ""
        self._held: End | None = None

    def of(self, key: str, walked: Callable[[], End]) -> End:
        """What `walked` gives, or gave when it was last called, for the same key."""
        if self._held is None or key != self._key:
            self._held = None  # two are never held at once
            walk, traffic = walked()
            walk.hidden.put_down()
            walk.calls.clear()
            self._key, self._held = key, (walk, traffic)
        return self._held

    @staticmethod
    def nbytes(skeleton: Skeleton, sets: Sequence[Windows]) -> int:
        return sum(entry.ids_NL.numel() for entry in sets) * skeleton.config.get_text_config().hidden_size * skeleton.dtype.itemsize


@torch.no_grad()
def measure(
    skeleton: Skeleton, other: Skeleton | None, sets: Sequence[Windows], *, device: str, cache: ResultCache, ends: Ends | None, reporter: Reporter
) -> dict[str, Any]:  # fmt: skip
    """Sums of each window ("sums": name -> list over the windows of all texts) and "traffic". From the cache where these models have seen
    just these windows before."""
    ids = torch.cat([entry.ids_NL for entry in sets])
    scored_NL = torch.cat([entry.scored_NL for entry in sets])
    depends = {
        "kind": "texts", "model": identity(skeleton.checkpoint), "against": identity(other.checkpoint) if other else None,
        "windows": _digest(ids, scored_NL),
        "dtype": str(skeleton.dtype), "device": torch.device(device).type,
    }  # fmt: skip
    if (known := cache.get(depends)) is not None:
        reporter.say("Texts: measured before, taken from the cache (--no-cache measures again).")
        return known
    batches = list(ids.split(max(1, BATCH_TOKENS // ids.shape[1])))
    student, sent = _final_hidden(skeleton, batches, scored_NL, device, reporter)
    teacher, against_sent = None, None
    if other is not None:

        def walked() -> End:
            return _final_hidden(other, batches, scored_NL, device, reporter)

        key = json.dumps([depends["against"], depends["windows"], depends["dtype"], device])
        teacher, against_sent = walked() if ends is None else ends.of(key, walked)
    sums = _compare(student, teacher, scored_NL, reporter)
    made = {
        "sums": {name: value.tolist() for name, value in sums.items()},
        "traffic": _traffic(sent, against_sent, skeleton.config.get_text_config().hidden_size),
    }  # fmt: skip
    cache.put(depends, made)
    return made


def _digest(ids_NL: torch.Tensor, scored_NL: torch.Tensor) -> str:
    return digest([ids_NL.numpy().tobytes(), scored_NL.numpy().tobytes(), str(tuple(ids_NL.shape)).encode()])


def rows(sets: Sequence[Windows], sums: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a text: its numbers and their intervals."""
    made, start = [], 0
    for entry in sets:
        part = {name: torch.tensor(values[start : start + len(entry.ids_NL)], dtype=torch.float64) for name, values in sums.items()}
        start += len(entry.ids_NL)
        made.append(_summary(entry, part) | intervals.of_text(part, entry.document_N))
    return made


def _final_hidden(skeleton: Skeleton, batches: list[torch.Tensor], scored_NL: torch.Tensor, device: str, reporter: Reporter) -> End:
    """A walk at its end, and what its routers decided for the scored positions: each token once, and never padding."""
    walk, traffic = LayerWalk(skeleton, batches, device=device), Traffic()
    counted = scored_NL.to(walk.device).split([len(batch) for batch in batches])
    for index in reporter.track(range(len(walk)), f"Run {skeleton.name}", len(walk), tokens=walk.share):
        with walk.layer(index) as layer, traffic.watching(layer, skeleton.sites.get(index), counted):
            walk.advance(index, layer)
    return walk, traffic


def _traffic(sent: Traffic, against: Traffic | None, hidden: int) -> dict[str, Any]:
    models = {"model": sent} | ({"against": against} if against is not None else {})
    ways = {str(number): {name: traffic.report(number) for name, traffic in models.items()} for number in WAYS}
    return {"hidden_bytes": hidden * ITEMSIZE, "ways": ways}


def _compare(student: LayerWalk, teacher: LayerWalk | None, scored_NL: torch.Tensor, reporter: Reporter) -> dict[str, torch.Tensor]:
    """Sums over the scored positions of each window, float64 [N]: tokens, nll, and against the teacher its nll, kl, agreement."""
    sums: dict[str, list[torch.Tensor]] = {}
    start = 0
    with contextlib.ExitStack() as stack:
        head = stack.enter_context(student.head())
        other = stack.enter_context(teacher.head()) if teacher is not None else None
        for batch in reporter.track(range(len(student.batches)), "Compare", len(student.batches)):
            ids = student.batches[batch]
            mask = scored_NL[start : start + len(ids)].to(ids.device)
            start += len(ids)
            here: dict[str, torch.Tensor] = {}
            ours, theirs = student.hidden[batch], teacher.hidden[batch] if teacher is not None else None
            for positions in student.pieces(batch):
                log_q = head(ours, batch, positions).float().log_softmax(-1)
                target, scored = ids.roll(-1, 1)[:, positions].unsqueeze(-1), mask[:, positions]
                values = {"tokens": scored.double(), "nll": -log_q.gather(-1, target).squeeze(-1)}
                if other is not None:
                    log_p = other(theirs, batch, positions).float().log_softmax(-1)
                    values["against_nll"] = -log_p.gather(-1, target).squeeze(-1)
                    values["agreement"] = (log_p.argmax(-1) == log_q.argmax(-1)).double()
                    values["kl"] = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding may put it below
                for name, value in values.items():
                    here[name] = here.get(name, 0) + (value.double() * scored).sum(1)
            for name, value in here.items():
                sums.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(parts) for name, parts in sums.items()}


def perplexity(nll: float) -> float:
    """exp of nats per token, or the largest that JSON and a float64 hold."""
    return math.exp(min(nll, LARGEST))


def _summary(entry: Windows, sums: dict[str, torch.Tensor]) -> dict[str, Any]:
    tokens = float(sums["tokens"].sum())
    row: dict[str, Any] = {
        "name": entry.name, "documents": int(entry.document_N.unique().numel()), "tokens": int(tokens),
        "perplexity": perplexity(float(sums["nll"].sum()) / tokens), "windows": _digest(entry.ids_NL, entry.scored_NL),
    }  # fmt: skip
    if "kl" in sums:
        row["against"] = {"perplexity": perplexity(float(sums["against_nll"].sum()) / tokens)}
        row["kl"] = float(sums["kl"].sum()) / tokens
        row["agreement"] = float(sums["agreement"].sum()) / tokens
    return row
