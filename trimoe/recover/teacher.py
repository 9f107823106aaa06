"""The original's next-token distributions, computed once and kept on disk, and the distance of the trained model's from them.

Distillation: Hinton et al., https://arxiv.org/abs/1503.02531. Per token  T^2 KL(p || q)  with p = softmax(teacher's logits / T) and
q = softmax(student's logits / T). Of p the K largest probabilities are kept; all other tokens are pooled into one class, in q as well.

Letters: N samples, B samples of a batch, L tokens of a sample, V tokens of the vocabulary, K probabilities kept a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trimoe.checkpoint.atomic import aside
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.progress import Reporter
from trimoe.text.samples import in_batches
from trimoe.walk.walk import LayerWalk

AT_ONCE = 1 << 29  # numbers in the hidden states of one walk; a larger set of samples takes several walks


@dataclass(frozen=True)
class Kept:
    """What is kept of the original's distributions, in natural logarithms: float32 values, int32 token numbers, and float32 of all other
    tokens together (-inf where none is left)."""

    value_BLK: torch.Tensor
    index_BLK: torch.Tensor
    rest_BL: torch.Tensor

    def at(self, places_P: torch.Tensor) -> Kept:
        """Of some positions."""
        if len(places_P) == self.rest_BL.shape[1]:
            return self
        return Kept(self.value_BLK[:, places_P], self.index_BLK[:, places_P], self.rest_BL[:, places_P])

    def to(self, device: torch.device | str) -> Kept:
        return Kept(self.value_BLK.to(device), self.index_BLK.to(device), self.rest_BL.to(device))


def keep(logits_BLV: torch.Tensor, temperature: float, top_k: int) -> Kept:
    """The `top_k` largest log-probabilities at `temperature`, and that of the rest."""
    log_p_BLV = (logits_BLV.float() / temperature).log_softmax(-1)
    value_BLK, index_BLK = log_p_BLV.topk(min(top_k, log_p_BLV.shape[-1]), -1)
    return Kept(value_BLK, index_BLK.int(), _others(log_p_BLV, index_BLK))


def distillation(logits_BLV: torch.Tensor, cached: Kept, temperature: float) -> torch.Tensor:
    """T^2 times the mean KL(teacher || student) per token, in nats; exact where nothing is pooled."""
    wide_BLV = logits_BLV.to(torch.promote_types(logits_BLV.dtype, torch.float32))
    log_q_BLV = (wide_BLV / temperature).log_softmax(-1)
    index_BLK = cached.index_BLK.long()
    value_BLK = cached.value_BLK.to(log_q_BLV.dtype)
    kl_BL = (value_BLK.exp() * (value_BLK - log_q_BLV.gather(-1, index_BLK))).sum(-1)
    if index_BLK.shape[-1] < log_q_BLV.shape[-1]:
        rest_BL = cached.rest_BL.to(log_q_BLV.dtype)
        kl_BL = kl_BL + rest_BL.exp() * (rest_BL - _others(log_q_BLV, index_BLK))
    return temperature**2 * kl_BL.mean()


def _others(log_p_BLV: torch.Tensor, index_BLK: torch.Tensor) -> torch.Tensor:
    """The log-probability of all tokens but the given ones. Summed, not taken as 1 - sum, which cancels where the rest is small."""
    return log_p_BLV.scatter(-1, index_BLK, -torch.inf).logsumexp(-1)


class Teacher:
    """The original's distributions for given samples, in files of `folder`. Samples are known by their numbers."""

    def __init__(self, folder: Path, batches: Sequence[torch.Tensor], temperature: float):
        self.temperature, self._parts = temperature, [self._file(folder, number) for number in range(len(batches))]
        self._place = [(part, row) for part, batch in enumerate(batches) for row in range(len(batch))]
        self._open: dict[int, Kept] = {}

    @classmethod
    def of(
        cls, skeleton: Skeleton, samples_NL: torch.Tensor, folder: Path, *, temperature: float, top_k: int, device: str, reporter: Reporter
    ) -> Teacher:
        """Stream the original over the samples, layer by layer, unless their files are there already."""
        batches = in_batches(samples_NL, device)
        missing = [number for number in range(len(batches)) if not cls._file(folder, number).is_file()]
        hidden = skeleton.config.get_text_config().hidden_size
        share = max(1, AT_ONCE // (hidden * batches[0].numel()))
        for start in range(0, len(missing), share):
            numbers = missing[start : start + share]
            walk = LayerWalk(skeleton, [batches[number] for number in numbers], device=device)
            walk.run(f"Run {skeleton.name}", reporter)
            with walk.head() as head:
                for place, number in enumerate(reporter.track(numbers, "Keep its distributions", len(numbers))):
                    parts = [keep(head(walk.hidden[place], place, at), temperature, top_k) for at in walk.pieces(place)]
                    _save(parts, cls._file(folder, number))
        return cls(folder, batches, temperature)

    @staticmethod
    def _file(folder: Path, number: int) -> Path:
        return folder / f"teacher-{number:05}.safetensors"

    def rows(self, samples: Sequence[int]) -> Kept:
        """Of the given samples, in that order."""
        found = [(self._part(part), row) for part, row in (self._place[sample] for sample in samples)]
        return Kept(*(torch.stack([getattr(part, name)[row] for part, row in found]) for name in ("value_BLK", "index_BLK", "rest_BL")))

    def _part(self, number: int) -> Kept:
        """Mapped, not read: the system keeps what fits in memory."""
        if number not in self._open:
            tensors = load_file(self._parts[number])
            self._open[number] = Kept(tensors["value"], tensors["index"], tensors["rest"])
        return self._open[number]


def _save(parts: Sequence[Kept], path: Path) -> None:
    """Pieces of one batch's positions, joined."""
    tensors = {
        "value": torch.cat([part.value_BLK for part in parts], 1),
        "index": torch.cat([part.index_BLK for part in parts], 1),
        "rest": torch.cat([part.rest_BL for part in parts], 1),
    }
    save_aside({name: tensor.cpu() for name, tensor in tensors.items()}, path)


def save_aside(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file that is either whole or not there."""
    with aside(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)


def refuse_other_vocabulary(teacher: Skeleton, student: Skeleton) -> None:
    sizes = [skeleton.config.get_text_config().vocab_size for skeleton in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{student.name} cannot learn from {teacher.name}: it knows {sizes[1]} tokens, {teacher.name} {sizes[0]}; give the model it was made from."
        )
