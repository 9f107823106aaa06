"""Expert-wise distillation: every expert that is left learns to give what it gave in the original model.

MoE-Pruner, https://arxiv.org/abs/2410.12013:  L = L_CE + lambda * sum over layers and experts of MSE(E_teacher(x), E_student(x)), over the
tokens that the *teacher* routes to the expert, with lambda = L_CE / L_expert on the first batch, fixed from then on. Both see the teacher's
hidden states, so each layer is a problem of its own: it is solved here with one layer of either model in memory. A layer alone has
no vocabulary loss; its lambda is 1 / L_expert on its first batch, which is the paper's up to a factor that Adam does not feel.

Letters: T tokens, k experts per token, S tokens routed to one expert, H hidden size, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trimoe.checkpoint.headers import DTYPES
from trimoe.errors import UserError
from trimoe.journal import Journal
from trimoe.model import transformers5
from trimoe.model.expert import by_expert, run_expert
from trimoe.model.skeleton import Skeleton
from trimoe.modeling_trimoe import DENSE, FactoredExperts
from trimoe.output.record import Record
from trimoe.output.rewriter import Rewriter
from trimoe.progress import Reporter
from trimoe.recipe.recover import Recover, schedule
from trimoe.recover.inputs import went_over, why_held
from trimoe.recover.pairs import Pair, pairs
from trimoe.recover.zeros import HeldZeros, zero_masks
from trimoe.show.format import counted
from trimoe.walk.expert_inputs import InputRecorder, LayerInputs
from trimoe.walk.walk import LayerWalk

CHECKS = 10  # validations of a layer, about
BETAS = (0.9, 0.95)
SEEDS = 1 << 16  # more than a model has layers


def distil(
    student: Skeleton, teacher: Skeleton, record: Record | None, spec: Recover, train: list[torch.Tensor],
    held: list[torch.Tensor], rewriter: Rewriter, journal: Journal, *, seed: int, device: str, reporter: Reporter,
) -> dict[str, Any]:  # fmt: skip
    """Train the student's experts layer by layer and put what improved into `rewriter`. Layers that the journal knows are not trained again.

    `train` and `held` are batches of token ids [B, L]. Returns by the student's layer the held-out loss `before` and `after` (sum over
    experts of the mean squared error) and the optimiser `steps`. A layer that does not improve stays as it is, to the bit.
    """
    found = pairs(record, teacher, student)
    stored = {index: _stored(student, index) for index in found}
    assert student.dtype == torch.float32, "experts are trained in float32"
    metrics = {index: journal.get(f"layer-{index}") for index in found}
    waiting = {found[index].teacher_layer: index for index in found if metrics[index] is None}
    known, held_layers = went_over(record, student), 0
    if waiting:
        walk, own_walk = LayerWalk(teacher, [*train, *held], device=device), LayerWalk(student, [], device=device)
        count = max(waiting) + 1
        for index in reporter.track(range(count), "Distil experts", count, tokens=walk.share):
            with walk.layer(index) as layer:
                if index not in waiting:
                    walk.advance(index, layer)
                    continue
                new, site = waiting[index], teacher.sites[index]
                recorder = InputRecorder(sum(batch.numel() for batch in walk.batches))
                with recorder.attached(layer, site):
                    walk.advance(index, layer)
                lesson = _lesson(site.experts_of(layer), found[new], recorder.seen(), train)
                with own_walk.layer(new) as own:
                    learned = learn(
                        lesson, student.sites[new].experts_of(own), spec, stored[new],
                        size=spec.batch * train[0].shape[1], seed=seed * SEEDS + new,
                        known=_leaf_known(known, student, new),
                    )  # fmt: skip
                held_layers += learned.held
                if learned.state is not None:
                    rewriter.put(_on_disk(student, new, learned.state))
                else:  # a run that was killed while it wrote may have left other numbers there
                    rewriter.put(
                        {
                            key: student.checkpoint.read(key)
                            for leaf in stored[new]
                            for key in student.source_keys(_name(student, new, leaf))
                        }
                    )
                metrics[new] = learned.to_json()
                journal.put(f"layer-{new}", learned.to_json())
                del recorder, lesson, learned  # not beside the next layer
        if held_layers:
            reporter.say(f"Zeros in the experts of {counted(held_layers, 'layer')} stay zero: {why_held(record)}.")
    return {str(index): metrics[index] for index in sorted(metrics)}


def _name(student: Skeleton, index: int, leaf: str) -> str:
    site = student.sites[index]
    return f"{student.layer_name(index)}.{site.block}.{site.experts}.{leaf}"


def _leaf_known(known: Callable[[str], bool], student: Skeleton, index: int) -> Callable[[str], bool]:
    return lambda leaf: known(_name(student, index, leaf))


def _stored(student: Skeleton, index: int) -> dict[str, torch.dtype]:
    """The dtype on disk of each of a layer's expert parameters. Raises UserError where they are no plain floating-point numbers."""
    dtypes, on_disk, dense = {}, student.checkpoint.stored, student.checkpoint.tensors
    for leaf, parameter in trainable(student.sites[index].experts_of(student.layers[index])).items():
        disk = _on_disk(student, index, {leaf: torch.empty(parameter.shape, device="meta")})
        other = [key for key, tensor in disk.items() if key not in on_disk or dense[key].shape != tuple(tensor.shape)]
        if other:
            raise UserError(
                f"{student.name}: {other[0]} is stored packed, not as plain floating-point numbers, and cannot be trained; recover first, "
                "then quantise."
            )
        found = {DTYPES[on_disk[key].dtype] for key in disk}
        if len(found) != 1 or not next(iter(found)).is_floating_point:
            raise UserError(
                f"{student.name}: the experts of layer {index} are stored as {sorted(map(str, found))}; one float dtype is expected."
            )
        dtypes[leaf] = found.pop()
    return dtypes


def _on_disk(student: Skeleton, index: int, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {_name(student, index, leaf): tensor for leaf, tensor in state.items()}
    disk = transformers5.to_disk_format(student.model, named, student.conversion)
    assert set(disk) == {key for name in named for key in student.source_keys(name)}, "written under other names than it was read from"
    return disk


# ---- one layer


@dataclass
class Lesson:
    """What one layer learns from: the teacher's experts and the tokens they were called with, `train` of them followed by those held out.
    `keep`: the student's experts by their number in the teacher."""

    experts: Any
    keep: tuple[int, ...]
    seen: LayerInputs
    train: int

    def loss(self, student: Any, tokens: torch.Tensor) -> torch.Tensor:
        """The differentiable loss on some of the tokens."""
        return expert_loss(self.experts, student, *self.seen.rows(tokens), self.keep)

    @torch.no_grad()
    def held_loss(self, student: Any, size: int) -> float:
        """The same on all tokens held out, `size` of them at a time."""
        square_E, count_E = torch.zeros(2, len(self.keep), dtype=torch.float64)
        for tokens in torch.arange(self.train, len(self.seen.x_TH)).split(size):
            square, count = expert_errors(self.experts, student, *self.seen.rows(tokens), self.keep)
            square_E, count_E = square_E + square, count_E + count
        return float((square_E / count_E.clamp_min(1)).sum())


@dataclass(frozen=True)
class Learned:
    """What came of one layer; `state` is None where nothing is better than what was there."""

    state: dict[str, torch.Tensor] | None
    before: float
    after: float
    steps: int
    held: bool = False  # whether it has zeros that stay

    def to_json(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after, "steps": self.steps}


def _lesson(experts: Any, pair: Pair, seen: LayerInputs, train: list[torch.Tensor]) -> Lesson:
    return Lesson(experts, pair.keep, seen, sum(batch.numel() for batch in train))


def trainable(experts: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' own weights and biases, stacked or factored."""
    return dict(experts.named_parameters(recurse=False))


def learn(
    lesson: Lesson, student: nn.Module, spec: Recover, stored: Mapping[str, torch.dtype], *, size: int, seed: int,
    known: Callable[[str], bool],
) -> Learned:  # fmt: skip
    """Train one layer's experts on minibatches of `size` tokens. `stored`: in which dtype each parameter will be written; the result is
    judged as it reads then. `known`: as in zero_masks."""
    student.requires_grad_(False)
    parameters = trainable(student)
    before = lesson.held_loss(student, size)
    if before == 0:
        return Learned(None, before, before, 0)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    masks = zero_masks(parameters, known)
    zeros = HeldZeros({parameters[name]: mask for name, mask in masks.items()})
    zeros.register()
    best, steps = _descend(lesson, student, parameters, zeros, spec, before, size, seed)
    if best is None:
        return Learned(None, before, before, steps, bool(masks))
    with torch.no_grad():
        for name, parameter in parameters.items():
            best[name] = best[name].to(stored[name])
            parameter.copy_(best[name])
    after = lesson.held_loss(student, size)
    return Learned(best, before, after, steps, bool(masks)) if after < before else Learned(None, before, before, steps, bool(masks))


def _descend(
    lesson: Lesson,
    student: nn.Module,
    parameters: dict[str, nn.Parameter],
    zeros: HeldZeros,
    spec: Recover,
    loss: float,
    size: int,
    seed: int,
) -> tuple[dict[str, torch.Tensor] | None, int]:
    """The best state that validation saw (None: the first one, of the given loss), and the steps done."""
    optimiser = torch.optim.AdamW(parameters.values(), lr=spec.peak, betas=BETAS, weight_decay=0.0, foreach=False)
    per_epoch = math.ceil(lesson.train / size)
    total = min(spec.epochs * per_epoch, spec.steps or spec.epochs * per_epoch)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: schedule(step, total, spec.warmup))
    best, idle, scale, step = None, 0, 0.0, 0
    for step, tokens in zip(range(1, total + 1), _minibatches(lesson.train, per_epoch, seed), strict=False):
        error = lesson.loss(student, tokens)
        scale = scale or 1.0 / (error.item() or math.inf)  # a batch without an error says nothing of it
        if error.requires_grad:  # else none of these tokens goes to an expert that is left
            optimiser.zero_grad()
            (scale * error).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), spec.clip)
            optimiser.step()
            zeros.hold()
        rates.step()
        if step % max(1, total // CHECKS) and step < total:
            continue
        now, idle = lesson.held_loss(student, size), idle + 1
        if now < loss:
            best = None  # not two of them at once
            best, loss, idle = {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}, now, 0
        if idle >= spec.patience:
            break
    return best, step


def _minibatches(tokens: int, parts: int, seed: int) -> Iterator[torch.Tensor]:
    """Token numbers in a new order every epoch, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(tokens, generator=generator).tensor_split(parts)


# ---- the loss


def expert_loss(
    teacher_experts: Any, student_experts: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, keep: tuple[int, ...]
) -> torch.Tensor:
    """Sum over the student's experts of the mean squared error (over routed tokens and H) to the outputs of the teacher's `keep[own]`.

    `index_TK` is the teacher's routing. Differentiable in the student's parameters; an expert without tokens adds nothing.
    """
    apart, total = Apart(student_experts), torch.zeros((), device=x_TH.device)
    for own, x_SH, y_SH in _taught(teacher_experts, keep, x_TH, index_TK):
        total = total + F.mse_loss(output_of(apart, own, x_SH.to(_dtype(student_experts))).float(), y_SH)
    return total


@torch.no_grad()
def expert_errors(
    teacher_experts: Any, student_experts: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, keep: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `expert_loss` divides, in float64 on the CPU: of each of the student's experts the squared error, and how many numbers it is of."""
    square_E, count_E = torch.zeros(2, len(keep), dtype=torch.float64)
    for own, x_SH, y_SH in _taught(teacher_experts, keep, x_TH, index_TK):
        error_SH = output_of(student_experts, own, x_SH.to(_dtype(student_experts))) - y_SH
        square_E[own] += error_SH.double().square().sum().cpu()
        count_E[own] += error_SH.numel()
    return square_E, count_E


def _taught(
    experts: Any, keep: tuple[int, ...], x_TH: torch.Tensor, index_TK: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(student's expert, its routed tokens, what the teacher's gives for them in float32), for every expert that has any."""
    own_of = {expert: own for own, expert in enumerate(keep)}
    for expert, places in by_expert(index_TK, experts.num_experts):
        if expert in own_of:
            x_SH = x_TH[places // index_TK.shape[-1]]
            with torch.no_grad():
                y_SH = output_of(experts, expert, x_SH).float()
            yield own_of[expert], x_SH, y_SH


def output_of(experts: Any, expert: int, x_SH: torch.Tensor) -> torch.Tensor:
    """One expert's output, stacked or factored, before its routing weight."""
    if isinstance(experts, FactoredExperts) or (isinstance(experts, Apart) and isinstance(experts.experts, FactoredExperts)):
        return FactoredExperts._one(experts, x_SH, expert)  # type: ignore[arg-type]
    return run_expert(experts, expert, x_SH)[1]


def _dtype(experts: nn.Module) -> torch.dtype:
    return next(experts.parameters(recurse=False)).dtype


class Apart:
    """Experts with their stacks taken apart at once: autograd then puts the gradient of a stack together once, and not from a whole
    stack of zeros for every expert."""

    def __init__(self, experts: nn.Module):
        self.experts = experts
        for name, parameter in trainable(experts).items():
            factor = isinstance(experts, FactoredExperts) and name.endswith(("_v", "_u"))
            setattr(self, name, _factors(experts, name) if factor else parameter.unbind(0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)

    def matrix(self, name: str, expert: int) -> tuple[Any, Any, Any]:
        """As FactoredExperts.matrix."""
        rank, start = self.experts.places[name][expert]  # type: ignore[index, union-attr]
        if rank == DENSE:
            return None, None, getattr(self, f"{name}_w")[start]
        return (None, None, None) if rank == 0 else (getattr(self, f"{name}_v")[expert], getattr(self, f"{name}_u")[expert], None)

    _biases = FactoredExperts._biases


def _factors(experts: Any, name: str) -> tuple[torch.Tensor, ...]:
    """Each expert's rows of one factor; none where its matrix is not factored."""
    ranks, parts = (experts.in_ranks, experts.parts) if name.startswith("in") else (experts.out_ranks, 1)
    return getattr(experts, name).split([max(rank, 0) * parts for rank in ranks])
