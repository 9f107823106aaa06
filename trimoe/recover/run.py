"""The whole recovery, top to bottom: check, text, the original's answers, train, write. Reads finished folders, writes another one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trimoe import team
from trimoe.checkpoint.atomic import write_text
from trimoe.checkpoint.headers import DTYPES
from trimoe.checkpoint.side_files import RECORD
from trimoe.checkpoint.whole import lost, lost_adapter, refuse_lost
from trimoe.errors import Diverged, UserError
from trimoe.journal import ANSWERS, FOLDER, Journal
from trimoe.model import transformers5
from trimoe.model.skeleton import Skeleton
from trimoe.output import card
from trimoe.output.record import Record
from trimoe.output.rewriter import Rewriter
from trimoe.plan import memory, recovery_memory
from trimoe.progress import LOG, QUIET, Reporter, logged
from trimoe.recipe.recover import Recover, parsed
from trimoe.recover import adapters, apart, experts, layers
from trimoe.recover.inputs import refuse_inside, refuse_packed, teacher_of, text_for, went_over, why_held
from trimoe.recover.loop import Training, TrainingJob, WithExperts, distilled, launcher, numbers, text_loss
from trimoe.recover.pairs import pairs
from trimoe.recover.teacher import Teacher
from trimoe.recover.zeros import HeldZeros, zero_masks
from trimoe.run.load import load
from trimoe.show.format import counted
from trimoe.text.samples import Calibration, in_batches
from trimoe.version import VERSION, versions
from trimoe.walk.walk import give_back, usable_device

Changed = Mapping[str, Callable[[], torch.Tensor]]  # full parameter name -> its new value, made when it is asked for
ADAPTER_RECORD = "recovered.json"  # beside a kept adapter, which is no model folder


@dataclass(frozen=True)
class Recovered:
    """A finished folder. `metrics`: numbers on held-out text `before` and `after`, and how training went."""

    out: Path
    metrics: dict[str, Any]


@dataclass
class RecoveryRun:
    """What every part of a recovery needs to know. `teacher` is None where the method learns from text alone."""

    student: Skeleton
    teacher: Skeleton | None
    record: Record
    spec: Recover
    text: Calibration
    count: int
    out: Path
    seed: int
    device: str
    dtype: torch.dtype
    streamed: bool  # whether frozen weights are read from their files as layers run
    reporter: Reporter

    @property
    def folder(self) -> Path:
        return self.out / FOLDER


def recover(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    spec: Recover | dict[str, Any],
    *,
    teacher: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    any_memory: bool = False,
    command: str | None = None,
    reporter: Reporter = QUIET,
) -> Recovered:
    """Train the finished folder `folder` and write the result to `out`, in the same form; called again with the same arguments it resumes.

    spec      the `recover` section of a recipe (trimoe/recipe/recover.py)
    teacher   the original; by default the model that trimoe.json names
    any_memory   begin even where training takes more memory than there is
    Raises UserError (a ValueError) for every mistake in the input, before anything is written.
    """
    out, spec, device, processes = Path(out), parsed(spec), str(device), launcher()
    if processes.num_processes == 1 and team.launched():
        raise UserError("recover: torchrun's processes do not share this work on this device; start it with accelerate launch.")
    if processes.num_processes > 1 and (spec.stream or spec.by_layer):
        raise UserError(
            f"recover: method {spec.method} goes layer by layer in one process; start it without accelerate launch, or set stream=false."
        )
    reporter = (reporter if processes.is_main_process else QUIET).fresh()
    call = f"trimoe.recover({str(folder)!r}, out, {spec.to_json()!r}, teacher={None if teacher is None else str(teacher)!r}, seed={seed!r}, device={device!r})"
    record = Record.to_train(Path(folder))
    with reporter.stage("Read headers"):
        student = Skeleton.of(str(folder))
        dtype = recovery_memory.precision(spec, student, device)
        original = teacher_of(spec, teacher, record, student, dtype)
    refuse_packed(spec, student)
    for skeleton in (student, original):
        refuse_inside(out, skeleton)
    usable_device(device)
    if spec.method in ("lora", "logits") and spec.train == "lora":
        adapters.import_peft()
    with reporter.stage("Tokenise the training text"):
        text, count = text_for(student, record.calibration_data, spec, seed, reporter)
    inputs = {
        "folder": student.checkpoint.fingerprint,
        "teacher": original.checkpoint.fingerprint if original else None, "recover": spec.to_json(), "seed": seed,
        "text": text.fingerprint, "version": VERSION, "dtype": str(dtype).removeprefix("torch."), "batch": len(in_batches(text.samples_NL, device)[0]),
    }  # fmt: skip
    finished = _finished(out, spec, inputs, student)
    if finished is not None:
        if processes.is_main_process:
            Journal(out, inputs).tidy()
        reporter.say(f"{out} holds the finished result of this very command already.")
        return finished
    alone = processes.num_processes == 1
    held, why = memory.of_training(student, original, spec if alone else replace(spec, stream=False), device)
    if not any_memory:
        held.refuse(device)
    journal = Journal(out, inputs)
    journal.refuse_other_content()
    streamed = why is not None or bool(spec.stream)
    run = RecoveryRun(student, original, record, spec, text, count, out, seed, device, dtype, streamed, reporter)
    main = processes.is_main_process
    with journal if main else contextlib.nullcontext(), logged(reporter, out / LOG, command or call, main=main):
        rewriter = Rewriter(student.checkpoint, out)
        if why is not None:
            reporter.say(f"{why[0].upper()}{why[1:]}.")
        try:
            metrics, job, changed = (_by_layer(run, rewriter, journal), None, {}) if spec.by_layer else _as_a_whole(run, processes)
            if main:
                entry = {
                    "method": spec.method, "spec": spec.to_json(), "metrics": metrics, "teacher": original.name if original else None,
                    "data": {"samples": count, "held": len(text.samples_NL) - count, "length": text.samples_NL.shape[1],
                             "domains": sorted(set(text.domains))},
                    "base": student.checkpoint.fingerprint, "command": command or call, "seed": seed, "versions": versions(), "inputs": inputs,
                    "streamed": streamed or spec.by_layer,
                }  # fmt: skip
                if spec.adapter and job is not None:
                    _keep_adapter(run, job, entry)
                else:
                    _rewrite(run, rewriter, changed, entry)
                journal.close()
        except Diverged:  # its advice, another rate, can be followed in the same folder
            if main:
                journal.forget_training()
            raise
    processes.wait_for_everyone()
    reporter.say(f"Wrote {out}: {_sentence(metrics)}.")
    if (kept := card.unimproved(metrics)) is not None:
        reporter.say(kept)
    return Recovered(out, metrics)


# ---- training


def _by_layer(run: RecoveryRun, rewriter: Rewriter, journal: Journal) -> dict[str, Any]:
    """`experts`, streamed: what was learned is in the rewriter."""
    assert run.teacher is not None
    with run.reporter.stage("Copy the folder"):
        rewriter.begin()
    samples_NL = run.text.samples_NL
    learned = experts.distil(
        run.student, run.teacher, run.record, run.spec, in_batches(samples_NL[: run.count], run.device),
        in_batches(samples_NL[run.count :], run.device), rewriter, journal, seed=run.seed, device=run.device, reporter=run.reporter,
    )  # fmt: skip
    sums = {when: {"expert_error": sum(layer[when] for layer in learned.values())} for when in ("before", "after")}
    return {**sums, "layers": learned}


def _as_a_whole(run: RecoveryRun, processes: Any) -> tuple[dict[str, Any], TrainingJob, Changed]:
    """The other methods: the model, and for `experts` the original too, in memory. The last of the three are the weights to be written, none
    where the start was best."""
    teacher = _answers(run, processes) if run.spec.method in ("router", "logits") else None
    place = processes.device if processes.num_processes > 1 else run.device
    with run.reporter.stage("Load the model"):
        offloaded = _offloaded(run, place) if run.streamed else None
        model = _loaded(run.student, place, run.dtype) if offloaded is None else offloaded.model
    if offloaded is None and _twice(run):
        layers.checkpointed(transformers5.decoder_layers(model)[1])
    job, about = _job(run, model, offloaded, teacher, place)
    give_back()  # what adapters and masks were made with
    training = Training(
        job, run.text.samples_NL, run.count, run.spec, run.folder, processes, seed=run.seed, device=run.device, reporter=run.reporter,
    )  # fmt: skip
    metrics = {**training.run(), **about, "trained": sum(parameter.numel() for parameter in job.trained.values())}
    changed: Changed = {}
    if metrics["best"] > 0 and not run.spec.adapter:
        changed = _rounded(run, job, training, offloaded)
        after = training.measured()
        if after[job.goal] < metrics["before"][job.goal]:
            metrics["after"] = numbers(after)
        else:  # what training gained is less than what rounding to the stored dtype takes
            changed, metrics["best"], metrics["after"] = {}, 0, metrics["before"]
    return metrics, job, changed


@torch.no_grad()
def _rounded(run: RecoveryRun, job: TrainingJob, training: Training, offloaded: layers.Offloaded | None) -> Changed:
    """The trained weights, adapters merged, in the dtypes that they are stored in; the job's model has them from now on. They are made anew when
    they are written: the model holds fewer bits where it computes in fewer than are stored."""
    made: Changed
    if not hasattr(job.model, "unload"):
        made = {name: partial(_stored_as, run, name, master.detach()) for name, master in training.masters.items()}
        for name, value in made.items():
            job.model.get_parameter(name).copy_(value())
        return made
    made, found = {}, adapters.merged(job.model)
    job.model = found.model
    for name, adapter in found.adapters.items():
        held, stored, change = job.model.get_parameter(name).detach(), _stored_dtype(run, name), partial(_merge, run, name, adapter)
        made[name] = partial(_merged, run, name, adapter)
        if offloaded is not None:
            offloaded.changes[name] = change
            continue
        change(held)
        if torch.promote_types(held.dtype, stored) == held.dtype:  # it is what will be stored
            made[name] = partial(held.to, stored)
    return made


def _stored_dtype(run: RecoveryRun, name: str) -> torch.dtype:
    key = run.student.source_keys(run.student.stored_names(name)[0])[0]
    return DTYPES[run.student.checkpoint.tensors[key].dtype]


def _stored_as(run: RecoveryRun, name: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter's new value in the dtype that it is stored in."""
    return value.to(_stored_dtype(run, name))


def _merge(run: RecoveryRun, name: str, adapter: Any, held: torch.Tensor) -> None:
    """Add an adapter's product to a weight that the model computes with, as it will read once it is stored."""
    stored = _stored_dtype(run, name)
    if torch.promote_types(held.dtype, stored) == held.dtype:
        apart.add(held, adapter, stored)
    else:  # which holds fewer bits than are stored
        held.copy_(_merged(run, name, adapter))


def _merged(run: RecoveryRun, name: str, adapter: Any) -> torch.Tensor:
    """A stored weight with what its adapter adds, rounded once."""
    sources = run.student.checkpoint.read_together(run.student.source_keys(name))
    weight = transformers5.read_parameter(run.student.model, name, sources).to(next(adapter.parameters()).device)
    apart.add(weight, adapter, _stored_dtype(run, name))
    return _stored_as(run, name, weight)


def _offloaded(run: RecoveryRun, place: Any) -> layers.Offloaded:
    """The model with what trains, and what lies outside its layers, in memory."""
    student = run.student if run.student.dtype == run.dtype else Skeleton.of(run.student.checkpoint, run.dtype)
    return layers.Offloaded(student, _routers(run) if run.spec.method == "router" else (), place)


def _routers(run: RecoveryRun) -> list[str]:
    student = run.student
    return [f"{student.layer_name(i)}.{site.block}.{path}" for i, site in student.sites.items() for path in site.router_paths()]


def _loaded(skeleton: Skeleton, place: Any, dtype: torch.dtype) -> Any:
    """The model in `dtype`, frozen, in eval mode: gradients flow all the same, and nothing is random."""
    options = {} if skeleton.checkpoint.scheme is None else {"backend": "dequantize"}  # gradients flow through it
    with transformers5._quiet_progress(), transformers5.read_one_by_one():
        model = load(skeleton.checkpoint.folder, device=place, dtype=dtype, **options).requires_grad_(False)
    give_back()  # what was read and put together
    transformers5.plain_outputs(model.config)
    return model


def _answers(run: RecoveryRun, processes: Any) -> Teacher:
    """The original's distributions for all samples, computed by the main process."""
    assert run.teacher is not None
    spec, samples_NL = run.spec, run.text.samples_NL
    of = json.dumps([run.teacher.checkpoint.fingerprint, run.text.fingerprint, spec.temperature, spec.top_k, str(run.dtype)])
    folder = run.folder / f"{ANSWERS}{hashlib.sha256(of.encode()).hexdigest()[:16]}"  # another rate may take them over
    if processes.is_main_process:
        folder.mkdir(exist_ok=True)
        Teacher.of(
            run.teacher, samples_NL, folder, temperature=spec.temperature, top_k=spec.top_k, device=run.device, reporter=run.reporter
        )
    processes.wait_for_everyone()
    give_back()
    return Teacher(folder, in_batches(samples_NL, run.device), spec.temperature)


def _job(
    run: RecoveryRun, model: Any, offloaded: layers.Offloaded | None, teacher: Teacher | None, place: Any
) -> tuple[TrainingJob, dict[str, Any]]:
    """What trains, by which loss; and what trimoe.json says of it."""
    spec, student = run.spec, run.student
    if spec.method == "experts":
        return _experts_job(run, model, place), {}
    loss, goal = (distilled(teacher), "kl") if teacher is not None else (text_loss, "loss")
    if spec.method in ("lora", "logits") and spec.train == "lora":
        known, weights = went_over(run.record, student), model.named_parameters() if offloaded is None else offloaded.weights()
        inside = {name for name, weight in weights if name.startswith(student.prefix + ".") and zero_masks({name: weight}, known)}
        wanted = adapters.targets(model, student, avoid=() if spec.adapter else inside)
        if inside and spec.adapter:
            run.reporter.say(
                f"Adapters fill the zeros of {counted(len(inside), 'parameter')} once they are merged ({why_held(run.record)})."
            )
        elif inside:
            run.reporter.say(
                f"Merged adapters would fill pruned zeros ({why_held(run.record)}): the {len(inside)} parameters that have some get none."
            )
        model = adapters.attach(model, wanted, spec, run.seed)
        return TrainingJob(model, adapters.trainable(model), loss, goal, teacher), adapters.described(wanted)
    if spec.method == "router":
        names = _routers(run)
        trained = {name: parameter for name, parameter in model.named_parameters() if name in names}
    else:
        trained = dict(model.named_parameters())
    return TrainingJob(model, _training(trained), loss, goal, teacher, held=_held(run, trained)), {}


def _twice(run: RecoveryRun) -> bool:
    """Whether layers compute again in the backward pass."""
    return recovery_memory.computed_again(run.student, run.spec, run.dtype, recovery_memory.weights(run.student))


def _experts_job(run: RecoveryRun, model: Any, place: Any) -> TrainingJob:
    """The paper's own form: both models in memory; the experts' weights and biases train."""
    assert run.teacher is not None
    original = _loaded(run.teacher, place, run.dtype)
    found = pairs(run.record, run.teacher, run.student)
    paths = [f"{run.student.layer_name(i)}.{run.student.sites[i].block}.{run.student.sites[i].experts}." for i in found]
    trained = {name: parameter for name, parameter in model.named_parameters() if name.startswith(tuple(paths))}
    constants: dict[str, float] = {}
    loss = WithExperts(run.student, original, run.teacher, found, constants, layers.again if _twice(run) else layers.at_once)
    return TrainingJob(model, _training(trained), loss, constants=constants, held=_held(run, trained))


def _training(trained: dict[str, Any]) -> dict[str, Any]:
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _held(run: RecoveryRun, trained: dict[str, Any]) -> HeldZeros | None:
    masks = zero_masks(trained, went_over(run.record, run.student))
    if masks:
        run.reporter.say(f"Zeros in {counted(len(masks), 'parameter')} stay zero: {why_held(run.record)}.")
    return HeldZeros({trained[name]: mask for name, mask in masks.items()}) if masks else None


# ---- writing


def _rewrite(run: RecoveryRun, rewriter: Rewriter, changed: Changed, entry: dict[str, Any]) -> None:
    """The folder's copy with the trained numbers."""
    give_back()  # what training took beside what is written
    with run.reporter.stage("Copy the folder"):
        rewriter.begin()
    stored = {own: value for name, value in changed.items() for own in run.student.stored_names(name)}
    for name, value in stored.items():
        disk = transformers5.to_disk_format(run.student.model, {name: value().cpu()}, run.student.conversion)
        assert set(disk) == set(run.student.source_keys(name)), f"{name} would be written under other names than it was read from"
        rewriter.put(disk)
    rewriter.finish(card.files(run.record.with_recovery(entry)))


def _keep_adapter(run: RecoveryRun, job: TrainingJob, entry: dict[str, Any]) -> None:
    """peft's files and what was done; the adapter's configuration comes last."""
    write_text(run.out / ADAPTER_RECORD, json.dumps(entry, indent=1) + "\n")
    adapters.save(job.model, run.student.checkpoint.folder, run.folder / "adapter", run.out, card.recovered(entry))


def _sentence(metrics: dict[str, Any]) -> str:
    found = [f"{name.replace('_', ' ')} {value:.4g} -> {metrics['after'][name]:.4g}" for name, value in metrics["before"].items()]
    return ", ".join(found) + " on held-out text"


def _finished(out: Path, spec: Recover, inputs: dict[str, Any], student: Skeleton) -> Recovered | None:
    """The result that `out` holds, if it is the finished one of the same inputs. Raises UserError where it is no longer whole."""
    name, last = (ADAPTER_RECORD, adapters.FILES[-1]) if spec.adapter else (RECORD, "config.json")
    if not (out / name).is_file() or ((out / FOLDER).is_dir() and not (out / last).is_file()):
        return None
    try:
        entry = json.loads((out / name).read_text(encoding="utf-8")) if spec.adapter else Record.read(out).recovered[-1]
        if entry["inputs"] != json.loads(json.dumps(inputs)):
            return None
        found = Recovered(out, entry["metrics"])
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    refuse_lost(out, lost_adapter(out, adapters.FILES) if spec.adapter else lost(out, student.checkpoint))
    return found
