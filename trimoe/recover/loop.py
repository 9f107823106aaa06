"""The training loop: AdamW, a cosine schedule, validation, the best state, and a run that can be killed and goes on to the same numbers.

Runs alone or under `accelerate launch`: every process takes its share of each batch, the main one writes.

Letters: N samples, B samples of a batch, L tokens of a sample, V tokens of the vocabulary, T tokens of a batch, H hidden size, K experts
a token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from trimoe.checkpoint.atomic import aside
from trimoe.errors import Diverged, UserError
from trimoe.model.skeleton import Skeleton
from trimoe.plan.recovery_memory import samples_at_once
from trimoe.progress import Reporter
from trimoe.recipe.recover import Recover, schedule
from trimoe.recover.experts import expert_errors, expert_loss
from trimoe.recover.head import Logits
from trimoe.recover.layers import Again
from trimoe.recover.pairs import Pair
from trimoe.recover.teacher import Kept, Teacher, distillation, save_aside
from trimoe.recover.zeros import HeldZeros
from trimoe.show.format import counted

VALIDATIONS = 10  # over a whole run, beside the one at the start
SAVE_EVERY = 60.0  # seconds between two states on disk
STATE = "training.pt"

Loss = Callable[[nn.Module, torch.Tensor, Sequence[int]], torch.Tensor]  # (model, ids [B, L], their sample numbers) -> scalar


class Learner(nn.Module):
    """A model and its loss as one module: what processes share is all computed inside one forward."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        return self.loss(self.model, ids_BL, samples)


@dataclass
class TrainingJob:
    """What is trained, and by which loss. `goal`: the validation number that says which state is best. `constants`: what a loss fixed on
    the first batch. `held`: zeros that stay."""

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    loss: Loss
    goal: str = "loss"
    teacher: Teacher | None = None
    constants: dict[str, float] = field(default_factory=dict)
    held: HeldZeros | None = None


def cross_entropy(logits: Logits) -> torch.Tensor:
    """Mean over the tokens that have one before them."""
    ids_BL = logits.ids_BL

    def part(logits_BPV: torch.Tensor, at_P: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_BPV.flatten(0, 1).float(), ids_BL[:, at_P + 1].flatten())

    return logits.mean(ids_BL.shape[1] - 1, part)


def divergence(logits: Logits, kept: Kept, temperature: float) -> torch.Tensor:
    """The distance from the original's distributions, which know every position."""
    return logits.mean(logits.ids_BL.shape[1], lambda logits_BPV, at_P: distillation(logits_BPV, kept.at(at_P), temperature))


def text_loss(model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    return cross_entropy(Logits(model, ids_BL))


def distilled(teacher: Teacher) -> Loss:
    def loss(model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        return divergence(Logits(model, ids_BL), teacher.rows(samples).to(ids_BL.device), teacher.temperature)

    return loss


class WithExperts:
    """MoE-Pruner's loss (https://arxiv.org/abs/2410.12013): L_CE + factor * sum over the MoE layers of the experts' squared errors on the
    original's hidden states; factor = L_CE / L_expert on the first batch, all of it, of all processes, then fixed. `again`: as in the function
    of that name."""

    def __init__(
        self, skeleton: Skeleton, teacher: nn.Module, of: Skeleton, pairs: Mapping[int, Pair], constants: dict[str, float], again: Again
    ):
        self.teacher, self.constants, self.again = teacher, constants, again
        self.paths = {i: (_experts_path(of, pair.teacher_layer), _experts_path(skeleton, i), pair.keep) for i, pair in pairs.items()}

    def __call__(self, model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        loss = text_loss(model, ids_BL, samples)
        experts = loss.new_zeros(())
        seen = self._calls(ids_BL)
        for path, own, keep in self.paths.values():
            x_TH, index_TK = seen[path]
            experts = experts + self.again(expert_loss, self.teacher.get_submodule(path), model.get_submodule(own), x_TH, index_TK, keep)
        return loss + self.constants["factor"] * experts

    @torch.no_grad()
    def measured(self, model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """What adds up over the parts of a batch to what the factor is made of, float64: the text's loss times its samples, their number,
        and of every expert the squared error and how many numbers it is of."""
        seen = self._calls(ids_BL)
        sums = [torch.stack([text_loss(model, ids_BL, samples).double() * len(ids_BL), torch.tensor(float(len(ids_BL))).to(ids_BL.device)])]
        for path, own, keep in self.paths.values():
            sums += expert_errors(self.teacher.get_submodule(path), model.get_submodule(own), *seen[path], keep)
        return torch.cat([part.double().to(ids_BL.device) for part in sums])

    def fix(self, total: torch.Tensor) -> None:
        """Set the factor by the sum of all `measured`."""
        experts, start = 0.0, 2
        for _, _, keep in self.paths.values():
            square_E, count_E = total[start : start + 2 * len(keep)].view(2, -1)
            experts, start = experts + float((square_E / count_E.clamp_min(1)).sum()), start + 2 * len(keep)
        self.constants["factor"] = float(total[0] / total[1]) / max(experts, 1e-20)

    @torch.no_grad()
    def _calls(self, ids_BL: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the original's experts are called with: hidden states [T, H] and the chosen experts [T, K]."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                names = ("hidden_states", "top_k_index")
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                seen[path] = (given[names[0]].flatten(0, -2), given[names[1]])

            return note

        paths = [path for path, _, _ in self.paths.values()]
        handles = [self.teacher.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in paths]
        try:
            self.teacher(input_ids=ids_BL, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _experts_path(skeleton: Skeleton, index: int) -> str:
    site = skeleton.sites[index]
    return f"{skeleton.layer_name(index)}.{site.block}.{site.experts}"


# ---- the loop


class Training:
    """Trains a job on the first `count` of the samples and validates on the others. Afterwards the job's parameters hold the best state."""

    def __init__(
        self, job: TrainingJob, samples_NL: torch.Tensor, count: int, spec: Recover, folder: Path, accelerator: Accelerator, *, seed: int,
        device: str, reporter: Reporter,
    ):  # fmt: skip
        self.job, self.samples_NL, self.count, self.spec, self.seed = job, samples_NL, count, spec, seed
        self.folder, self.accelerator, self.reporter = folder, accelerator, reporter
        self.device = accelerator.device if accelerator.num_processes > 1 else torch.device(device)
        world = accelerator.num_processes
        self.batch = min(spec.batch, count) // world * world
        if not self.batch:
            raise UserError(f"{world} processes share batches of {min(spec.batch, count)} samples; every one needs at least one.")
        self.each = count // self.batch
        self.steps = min(spec.steps or 1 << 60, spec.epochs * self.each)
        if spec.steps is not None and self.steps < spec.steps:
            text = f"{counted(spec.epochs, 'epoch')} of {counted(count, 'sample')} in batches of {self.batch}"
            reporter.say(f"There is room for only {self.steps} of the {spec.steps} steps asked for in {text}; give more epochs.")
        self.every = max(1, -(-self.steps // VALIDATIONS))
        self.step, self.bad, self.curve = 0, 0, list[dict[str, Any]]()
        self.learner = accelerator.prepare(Learner(job.model, job.loss))
        # What trains in fewer bits has a float32 master each, in which its steps and its gradients add up; the others are their own.
        self.masters = {
            name: parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
            for name, parameter in job.trained.items()
        }
        self.optimizer = accelerator.prepare(torch.optim.AdamW(self.masters.values(), lr=spec.peak, weight_decay=0.0))
        if world == 1:  # each gradient goes over as it comes; among several processes only once all have theirs
            for name, parameter in job.trained.items():
                if self.masters[name] is not parameter:
                    parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._over(name))  # type: ignore[misc]

    @property
    def best(self) -> dict[str, Any]:
        return min(self.curve, key=lambda entry: entry[self.job.goal])

    def run(self) -> dict[str, Any]:
        """Train to the end; what validation said at the start, in the best state, and in between."""
        if self.job.held is not None:
            self.job.held.register()
        if not self._resume():
            if isinstance(self.job.loss, WithExperts):
                self._fix(self.job.loss)
            self._validate()
        saved = time.monotonic()
        tokens = self.batch * self.samples_NL.shape[1]
        with self.reporter.steps(f"Train, {self.spec.method}", self.step, self.steps, tokens=tokens) as advance:
            while self.step < self.steps and self.bad < self.spec.patience:
                loss = self._optimise()
                self.step += 1
                if self.step % self.every == 0 or self.step == self.steps:
                    self._validate()
                advance(self.step, f", loss {loss:.4f}")
                if time.monotonic() - saved >= SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        self._save()
        self.accelerator.wait_for_everyone()
        self._give(self._best_file())
        rounds = {"steps": self.steps, "stopped": self.step, "best": self.best["step"], "curve": self.curve}
        return {"before": numbers(self.curve[0]), "after": numbers(self.best), **rounds, **self.job.constants}

    def _optimise(self) -> float:
        """One step on one batch; its loss (of this process's share)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.spec.peak * schedule(self.step, self.steps, self.spec.warmup)
        chosen = self._order(self.step // self.each)[self.step % self.each * self.batch :][: self.batch]
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        self.optimizer.zero_grad()
        total = 0.0
        for part in self._pieces(mine):
            ids_BL = self.samples_NL[part].to(self.device)
            loss = self.learner(ids_BL, part) * (len(part) / len(mine))
            self.accelerator.backward(loss)
            for name in self.masters:
                self._over(name)
            total += float(loss.detach())
        if not math.isfinite(self._of_all(total)):  # of any process: they stop together
            raise Diverged(f"Training diverged at step {self.step + 1}: the loss is {total}; give a rate below {self.spec.peak:g}.")
        self.accelerator.clip_grad_norm_(list(self.masters.values()), self.spec.clip)
        self.optimizer.step()
        self._publish()
        if self.job.held is not None:
            self.job.held.hold()
        return total

    def _fix(self, loss: WithExperts) -> None:
        """The factor, from the first batch: the same for any number of processes and whatever goes through the model at once."""
        mine = self._order(0)[: self.batch][self.accelerator.process_index :: self.accelerator.num_processes]
        parts = [loss.measured(self.job.model, self.samples_NL[part].to(self.device), part) for part in self._pieces(mine)]
        total = torch.stack(parts).sum(0)
        loss.fix((total if self.accelerator.num_processes == 1 else self.accelerator.reduce(total, reduction="sum")).cpu())

    @torch.no_grad()
    def _over(self, name: str) -> None:
        """Move a parameter's gradient to its master."""
        parameter, master = self.job.trained[name], self.masters[name]
        if master is not parameter and parameter.grad is not None:
            given, parameter.grad = parameter.grad, None
            master.grad = given.float() if master.grad is None else master.grad.add_(given)

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the model what its masters have become."""
        for name, parameter in self.job.trained.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def _of_all(self, value: float) -> float:
        """The sum over the processes."""
        if self.accelerator.num_processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device), reduction="sum"))

    def _order(self, epoch: int) -> list[int]:
        """The training samples in this epoch's order; what does not fill a batch at its end is left for other epochs."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(self.count, generator=generator).tolist()

    def _pieces(self, samples: Sequence[int]) -> list[list[int]]:
        """Samples that go through the model together."""
        vocabulary = self.job.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        share = samples_at_once(self.samples_NL.shape[1], vocabulary)
        return [list(samples[start : start + share]) for start in range(0, len(samples), share)]

    # ---- validation

    @torch.no_grad()
    def measured(self) -> dict[str, Any]:
        """The model as it is now, on the samples held out: perplexity, and KL where the original's distributions are known."""
        held = range(self.count, len(self.samples_NL))
        loss = kl = 0.0
        for part in self._pieces(held):
            ids_BL = self.samples_NL[part].to(self.device)
            logits = Logits(self.job.model, ids_BL)
            loss += float(cross_entropy(logits)) * len(part) / len(held)
            if self.job.teacher is not None:
                kept = self.job.teacher.rows(part).to(self.device)
                kl += float(divergence(logits, kept, self.job.teacher.temperature)) * len(part) / len(held)
        entry = {"step": self.step, "loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.job.teacher is not None:
            entry["kl"] = kl
        if not math.isfinite(entry[self.job.goal]):
            raise Diverged(
                f"Training diverged at step {self.step}: the loss on held-out text is {loss}; give a rate below {self.spec.peak:g}."
            )
        return entry

    def _validate(self) -> None:
        entry = broadcast_object_list([self.measured()])[0]  # every process goes by the main one's: last bits may differ
        self.curve.append(entry)
        if self.best is entry:
            self.bad = 0
            if self.accelerator.is_main_process:
                save_aside({name: master.detach().cpu() for name, master in self.masters.items()}, self._best_file())
        else:
            self.bad += 1

    # ---- a state on disk

    def _best_file(self) -> Path:
        return self.folder / f"best-{self.best['step']:08}.safetensors"

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "trained": {name: master.detach().cpu() for name, master in self.masters.items()},
            "optimizer": self.optimizer.state_dict(), "step": self.step, "bad": self.bad, "curve": self.curve,
            "constants": dict(self.job.constants),
        }  # fmt: skip
        with aside(self.folder / STATE) as part:
            torch.save(state, part)
        for old in self.folder.glob("best-*.safetensors"):
            if old != self._best_file():  # only now: the state before this one could have named it
                old.unlink()

    def _resume(self) -> bool:
        path = self.folder / STATE
        if not path.is_file():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._set(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.bad, self.curve = state["step"], state["bad"], state["curve"]
        self.job.constants.update(state["constants"])
        return True

    def _give(self, path: Path) -> None:
        self._set(load_file(path))

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, master in self.masters.items():
            master.copy_(values[name])
        self._publish()


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}


def launcher() -> Accelerator:
    """Where this process stands among those that `accelerate launch` started; alone, a plain loop. Models are placed by the caller."""
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # the others wait while the main process runs the original
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True), patient]  # unused: experts that no token chose
    return Accelerator(device_placement=False, mixed_precision="no", kwargs_handlers=handlers)
