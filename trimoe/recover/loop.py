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

from trimoe.aside import aside
from trimoe.errors import UserError
from trimoe.progress import Reporter
from trimoe.recover.experts import expert_loss
from trimoe.recover.pairs import Pair
from trimoe.recover.spec import Diverged, Recover, schedule
from trimoe.recover.teacher import Teacher, distillation, save_aside
from trimoe.recover.zeros import Held
from trimoe.skeleton import LOGITS, Skeleton
from trimoe.spill import wider
from trimoe.words import counted

VALIDATIONS = 10  # over a whole run, beside the one at the start
SAVE_EVERY = 60.0  # seconds between two states on disk
STATE = "training.pt"

Loss = Callable[[nn.Module, torch.Tensor, Sequence[int]], torch.Tensor]  # (model, ids [B, L], their sample numbers) -> scalar


@dataclass
class Job:
    """What is trained, and by which loss. `goal`: the validation number that says which state is best. `constants`: what a loss fixed on
    the first batch. `held`: zeros that stay."""

    model: nn.Module
    trained: Mapping[str, nn.Parameter]
    loss: Loss
    goal: str = "loss"
    teacher: Teacher | None = None
    constants: dict[str, float] = field(default_factory=dict)
    held: Held | None = None


def cross_entropy(logits_BLV: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that have one before them."""
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), ids_BL[:, 1:].flatten())


def text_loss(model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
    return cross_entropy(_logits(model, ids_BL), ids_BL)


def distilled(teacher: Teacher) -> Loss:
    """The distance from the original's distributions, which know every position."""

    def loss(model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        return distillation(_logits(model, ids_BL), teacher.rows(samples).to(ids_BL.device), teacher.temperature)

    return loss


class WithExperts:
    """MoE-Pruner's loss (https://arxiv.org/abs/2410.12013): L_CE + factor * sum over the MoE layers of the experts' squared errors on the
    original's hidden states; factor = L_CE / L_expert on the first batch, then fixed."""

    def __init__(self, skeleton: Skeleton, teacher: nn.Module, of: Skeleton, pairs: Mapping[int, Pair], constants: dict[str, float]):
        self.teacher, self.constants = teacher, constants
        self.paths = {i: (_experts_path(of, pair.teacher_layer), _experts_path(skeleton, i), pair.keep) for i, pair in pairs.items()}

    def __call__(self, model: nn.Module, ids_BL: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        loss = text_loss(model, ids_BL, samples)
        inner: Any = getattr(model, "module", model)
        experts = loss.new_zeros(())
        seen = self._calls(ids_BL)
        for path, own, keep in self.paths.values():
            x_TH, index_TK = seen[path]
            experts = experts + expert_loss(self.teacher.get_submodule(path), inner.get_submodule(own), x_TH, index_TK, keep)
        if "factor" not in self.constants:
            self.constants["factor"] = float(loss.detach() / experts.detach().clamp_min(1e-20))
        return loss + self.constants["factor"] * experts

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


def _logits(model: nn.Module, ids_BL: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BL, use_cache=False).logits


# ---- the loop


class Training:
    """Trains a job on the first `count` of the samples and validates on the others. Afterwards the job's parameters hold the best state."""

    def __init__(
        self, job: Job, samples_NL: torch.Tensor, count: int, spec: Recover, folder: Path, accelerator: Accelerator, *, seed: int,
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
        self.model = accelerator.prepare(job.model)
        self.optimizer = accelerator.prepare(torch.optim.AdamW(job.trained.values(), lr=spec.peak, weight_decay=0.0))

    @property
    def best(self) -> dict[str, Any]:
        return min(self.curve, key=lambda entry: entry[self.job.goal])

    def run(self) -> dict[str, Any]:
        """Train to the end; what validation said at the start, in the best state, and in between."""
        if self.job.held is not None:
            self.job.held.register()
        if not self._resume():
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
            loss = self.job.loss(self.model, ids_BL, part) * (len(part) / len(mine))
            self.accelerator.backward(loss)
            total += float(loss.detach())
        if not math.isfinite(self._of_all(total)):  # of any process: they stop together
            raise Diverged(f"Training diverged at step {self.step + 1}: the loss is {total}; give a rate below {self.spec.peak:g}.")
        self.accelerator.clip_grad_norm_(list(self.job.trained.values()), self.spec.clip)
        self.optimizer.step()
        if self.job.held is not None:
            self.job.held.hold()
        return total

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
        """Samples whose logits fit in memory together."""
        vocabulary = self.job.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        share = max(1, LOGITS * wider(self.device) // (self.samples_NL.shape[1] * vocabulary))
        return [list(samples[start : start + share]) for start in range(0, len(samples), share)]

    # ---- validation

    @torch.no_grad()
    def measured(self) -> dict[str, Any]:
        """The model as it is now, on the samples held out: perplexity, and KL where the original's distributions are known."""
        held = range(self.count, len(self.samples_NL))
        loss = kl = 0.0
        for part in self._pieces(held):
            ids_BL = self.samples_NL[part].to(self.device)
            logits_BLV = _logits(self.job.model, ids_BL)
            loss += float(cross_entropy(logits_BLV, ids_BL)) * len(part) / len(held)
            if self.job.teacher is not None:
                kept = self.job.teacher.rows(part).to(self.device)
                kl += float(distillation(logits_BLV, kept, self.job.teacher.temperature)) * len(part) / len(held)
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
                save_aside({name: parameter.detach().cpu() for name, parameter in self.job.trained.items()}, self._best_file())
        else:
            self.bad += 1

    # ---- a state on disk

    def _best_file(self) -> Path:
        return self.folder / f"best-{self.best['step']:08}.safetensors"

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "trained": {name: parameter.detach().cpu() for name, parameter in self.job.trained.items()},
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
        for name, parameter in self.job.trained.items():
            parameter.copy_(values[name])


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}


def launcher() -> Accelerator:
    """Where this process stands among those that `accelerate launch` started; alone, a plain loop. Models are placed by the caller."""
    patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # the others wait while the main process runs the original
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True), patient]  # unused: experts that no token chose
    return Accelerator(device_placement=False, mixed_precision="no", kwargs_handlers=handlers)
