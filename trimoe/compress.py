"""The whole job, top to bottom: plan, calibrate, decide, transform, write. The only file that knows the order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trimoe.calibration.gather import ROUTING, statistics
from trimoe.calibration.statistics import Stats, from_main
from trimoe.checkpoint import free_disk
from trimoe.checkpoint.folder import Checkpoint
from trimoe.checkpoint.headers import read_json
from trimoe.checkpoint.whole import lost, refuse_lost
from trimoe.errors import UserError, reading
from trimoe.journal import FOLDER, STAGE, Journal
from trimoe.methods import FARTHEST
from trimoe.methods.lab import Lab, decide, rounded
from trimoe.model.decision import Decisions, unchanged
from trimoe.model.precision import compute_dtype, dtype_name
from trimoe.model.skeleton import Skeleton
from trimoe.output import card, card_metadata
from trimoe.output.last_walk import transform
from trimoe.output.layout import Layout
from trimoe.output.record import Record
from trimoe.output.writer import Writer
from trimoe.plan import disk, memory, size_by_part
from trimoe.plan.plan import Plan, final_plan, plan, skeleton_for
from trimoe.progress import LOG, QUIET, Reporter, logged
from trimoe.recipe import recipe as recipes
from trimoe.recipe.recipe import Recipe, with_calibration
from trimoe.recipe.recover import Recover
from trimoe.recover.inputs import check, refuse_inside
from trimoe.recover.run import recover
from trimoe.show.format import human, listed
from trimoe.team import ALONE, Team, team
from trimoe.text.documents import START
from trimoe.text.samples import NO_TEXT, Calibration, calibrate, check_shared_out, most_tokens
from trimoe.text.spec import CalibrationSpec
from trimoe.version import VERSION
from trimoe.walk.finite import NotFinite
from trimoe.walk.walk import LayerWalk, usable_device

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Result:
    """A finished folder. `metrics`: what every step decided and what it cost, layer by layer."""

    out: Path
    decisions: Decisions
    metrics: dict[str, Any]
    plan: Plan


def compress(
    model: str | os.PathLike[str],
    recipe: str | dict[str, Any] | Recipe,
    out: str | os.PathLike[str],
    *,
    changes: str | Sequence[str] = (),
    calibration: str | Sequence[str] = (),
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    stats: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    any_memory: bool = False,
    command: str | None = None,
    reporter: Reporter = QUIET,
) -> Result:
    """Compress `model` by `recipe` into the folder `out`; killed and called again with the same arguments it resumes.

    model, recipe   as on the command line; `changes` are "path=value" overrides of recipe fields
    calibration     text sources in place of the recipe's; `samples`, `length` likewise
    stats           a statistics file (trimoe stats) to take the first step's statistics from
    A recipe with a `recover` section compresses into OUT/.trimoe first, and what is trained from there is written to `out`.
    device, dtype   where and in which precision the layers run (`auto`: bfloat16 on a GPU that computes in it, else float32); the result
                    keeps the source's dtypes
    any_memory      begin even where the plan takes more memory than there is
    Started by torchrun the processes share the work (docs/scale.md); rank 0 writes, all return the result.
    Raises UserError (a ValueError) for every mistake in the input, before anything is written.
    """
    out, changes, calibration = Path(out), listed(changes), listed(calibration)
    device = str(device)
    compute_dtype(dtype, device)  # a name that is none is said at once
    with team(device) as processes:
        reporter = (reporter if processes.main else QUIET).fresh()

        def on_paper() -> tuple[Job, Plan]:
            parsed = with_calibration(recipes.load(recipe, changes), calibration, samples, length)
            with reporter.stage("Read headers and plan"):
                skeleton = skeleton_for(str(model), [parsed], dtype, device)
                before = possible(skeleton, parsed, out, device, any_memory, processes)
            text = text_of(skeleton, parsed, seed, reporter)
            call = (
                f"trimoe.compress({str(model)!r}, {recipe!r}, out, changes={changes!r}, calibration={calibration!r}, "
                f"samples={samples!r}, length={length!r}, seed={seed!r}, device={device!r}, dtype={dtype_name(skeleton.dtype)!r})"
            )
            job = job_of(skeleton, parsed, text, seed, device, command or call, reporter, processes)
            return replace(job, warnings=tuple(before.warnings)), before

        job, before = processes.after_main(on_paper)
        return job.done(out, before, stats)


def possible(skeleton: Skeleton, parsed: Recipe, out: Path, device: str, any_memory: bool, processes: Team = ALONE) -> Plan:
    """The plan. Raises UserError for every mistake that can be found without reading text or weights."""
    before = plan(skeleton, parsed, device=device)
    refuse_inside(out, skeleton)
    if (skeleton.checkpoint.folder / GENERATION).is_file():
        read_json(skeleton.checkpoint.folder / GENERATION)  # which is carried over: what loads the result would meet it
    usable_device(processes.place(device))
    if parsed.recover is not None and processes.count > 1:
        raise UserError("A recipe with recover runs in one process; leave recover out, then: accelerate launch -m trimoe.cli recover ...")
    if not any_memory:
        before.held.refuse(processes.place(device), processes.here)
    return before


def job_of(
    skeleton: Skeleton, parsed: Recipe, text: Calibration, seed: int, device: str, command: str, reporter: Reporter,
    processes: Team = ALONE,
) -> Job:  # fmt: skip
    """What is left to do once the plan is known and the text is read."""
    if parsed.recover is not None:
        check(parsed.recover, skeleton, parsed.calibration.data, seed)
    place = processes.place(device)
    with reporter.stage("Fingerprint the model"):
        about = {
            "model": skeleton.checkpoint.fingerprint,
            "seed": seed,
            "calibration": text.fingerprint,
            "dtype": dtype_name(skeleton.dtype),
        }
    run = Lab(
        skeleton, parsed.steps, parsed.calibration, _batches(text, place, processes), seed, place, about, reporter, processes, text.domains
    )  # fmt: skip
    inputs = {"recipe": replace(parsed, recover=None).to_json(), **about, "version": VERSION}
    return Job(parsed, run, text, inputs, command)


@dataclass(frozen=True)
class Job:
    """A compression that nothing on paper speaks against; `warnings` are said as the work begins."""

    recipe: Recipe
    run: Lab
    text: Calibration
    inputs: dict[str, Any]
    command: str
    warnings: tuple[str, ...] = ()

    def done(self, out: Path, before: Plan, stats: str | os.PathLike[str] | None) -> Result:
        """The result in `out`: found there, or made, and trained where the recipe says so."""
        run, main = self.run, self.run.team
        source = run.skeleton.checkpoint
        finished = main.from_main(lambda: _finished(out, self.inputs, self.recipe.recover, source))
        if finished is not None:
            Journal(out, self.inputs, main).tidy()
            run.reporter.say(f"{out} holds the finished result of this very command already.")
            return finished
        main.from_main(lambda: _refuse_other_result(out, self.inputs))
        given = from_main(main, lambda: _given_stats(stats, run.about, run.skeleton, self.recipe))
        if self.recipe.recover is None:
            return self.compressed(out, before, given, out)
        stage = out / FOLDER / STAGE
        if not stage.exists():
            Journal(out, self.inputs).refuse_other_content()
        made = _finished(stage, self.inputs, None, source)
        if made is None:
            made = self.compressed(stage, before, given, out)
        Journal(stage, self.inputs).tidy()
        self._adopt(stage)
        trained = recover(
            stage, out, self.recipe.recover, seed=run.seed, device=run.device, any_memory=True, command=self.command, reporter=run.reporter
        )
        return replace(made, out=out, metrics={**made.metrics, "recover": trained.metrics})

    def _adopt(self, stage: Path) -> None:
        """The first half of a recipe may be that of one whose training diverged: what is recorded is this one's recipe and command."""
        held = Record.read(stage)
        mine = held.with_command(self.recipe.to_json(), self.command)
        if mine != held:
            card.refresh(mine)
            mine.write()  # last, since it says that there is nothing left to do

    def compressed(self, out: Path, before: Plan, given: Stats | None, final_out: Path) -> Result:
        """Decide, transform, write; what a killed run has done already is taken from `out`. The log lies in `final_out`."""
        run, text, parsed, skeleton = self.run, self.text, self.recipe, self.run.skeleton
        journal = Journal(out, self.inputs, run.team, log=final_out / LOG)
        run.team.from_main(journal.refuse_other_content)
        others = (run.team.here - 1) * disk.search_spilled(skeleton, parsed, text.samples_NL.numel())
        run.team.from_main(lambda: free_disk.check(out, before.disk, before.spill + others))
        with journal, journal.forgotten(NotFinite), logged(run.reporter, final_out / LOG, self.command, main=run.team.main):
            for warning in self.warnings:
                run.reporter.say(f"warning: {warning}")
            decisions, metrics = unchanged(skeleton.sites), {}
            for number, step in enumerate(parsed.steps):
                name = f"{number}.{step.name}"
                decisions, metrics[name] = decide(
                    replace(run, number=number, decisions=decisions, journal=journal, given=given if number == 0 else None)
                )
            final = final_plan(skeleton, decisions, parsed, text.samples_NL.numel(), str(run.device))
            run.team.from_main(lambda: free_disk.check(out, final.disk, final.spill))
            layout = Layout(skeleton, decisions)
            writer = Writer(layout, out)
            metrics |= rounded(transform(run, decisions, writer, journal))
            record = Record.of(
                out, skeleton, text, recipe=parsed.to_json(), plan=final.to_json(), decisions=decisions, metrics=metrics,
                parts=size_by_part.parts(layout), source_card=card_metadata.inherited(skeleton.checkpoint.folder),
                command=self.command, seed=run.seed, inputs=self.inputs,
            )  # fmt: skip
            if run.team.main:
                writer.finish(card.files(record))
            journal.close()
        size = final.after.file_bytes
        run.reporter.say(f"Wrote {out}: {human(size)} of safetensors ({size / final.before.file_bytes:.1%}).")
        return Result(out, decisions, metrics, final)


def gather_statistics(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, calibration: str | Sequence[str] = (), samples: int | None = None,
    length: int | None = None, seed: int = 0, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto",
    any_memory: bool = False,
    reporter: Reporter = QUIET,
) -> Stats:  # fmt: skip
    """The statistics pass alone, saved to the file `out`; every score, ratio and search then starts from it."""
    base, device = Recipe(steps=(FARTHEST,)), str(device)
    precision = compute_dtype(dtype, device)
    with team(device) as processes:
        reporter = (reporter if processes.main else QUIET).fresh()

        def on_paper() -> tuple[Skeleton, CalibrationSpec, Calibration]:
            spec = with_calibration(base, calibration, samples, length).calibration
            with reporter.stage("Read headers"):
                skeleton = Skeleton.of(str(model), precision)
            refuse_inside(Path(out), skeleton)
            usable_device(processes.place(device))
            if processes.main and Path(out).exists():
                raise UserError(f"The statistics file {out} exists already; give another name.")
            if processes.main:
                free_disk.probe(Path(out), "--out")
            tokens, asked = most_tokens(spec.sources, spec.samples, min(spec.length, skeleton.context)), replace(base, calibration=spec)
            if not any_memory:
                memory.of_statistics(skeleton, asked, tokens, processes.place(device)).refuse(device, processes.here)
            if processes.main:
                spill = disk.spilled(skeleton, asked, tokens) + (processes.here - 1) * disk.search_spilled(skeleton, asked, tokens)
                free_disk.check(Path(out), disk.statistics(skeleton, asked, 0, tokens, ROUTING), spill, left=0)
            return skeleton, spec, calibration_for(skeleton, spec, seed, reporter)

        skeleton, spec, text = processes.after_main(on_paper)
        about = {"model": skeleton.checkpoint.fingerprint, "calibration": text.fingerprint, "seed": seed, "dtype": dtype_name(precision)}
        place = processes.place(device)
        call = (
            f"trimoe.gather_statistics({str(model)!r}, out, calibration={listed(calibration)!r}, seed={seed!r}, device={device!r}, "
            f"dtype={dtype_name(precision)!r})"
        )
        if processes.main:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        with logged(reporter, Path(f"{out}.log"), call, main=processes.main):
            stats = statistics(
                skeleton, _batches(text, place, processes), reach=FARTHEST.reach(skeleton.sites), search_tokens=spec.search_tokens,
                search_memory=spec.search_memory, seed=seed, device=place, about=about, reporter=reporter, team=processes,
            )  # fmt: skip
            if processes.main:
                stats.save(Path(out))
        return stats


# ---- input


def text_of(skeleton: Skeleton, parsed: Recipe, seed: int, reporter: Reporter) -> Calibration:
    """The recipe's calibration text; none where no step reads any: then the model needs no tokenizer."""
    if not parsed.reads_text:
        return NO_TEXT
    try:
        return calibration_for(skeleton, parsed.calibration, seed, reporter)
    except UserError as mistake:
        hints = [step.text_hint for step in parsed.steps if step.reads_text]
        if "has no tokenizer" in str(mistake) and None not in hints:
            raise UserError(f"{mistake} {hints[0]}") from None
        raise


def calibration_for(skeleton: Skeleton, spec: CalibrationSpec, seed: int, reporter: Reporter) -> Calibration:
    if spec.length > skeleton.context:
        reporter.say(f"Samples of {spec.length} tokens are cut to {skeleton.context}, the model's context.")
    vocabulary = skeleton.config.get_text_config().vocab_size
    with reporter.stage("Tokenise the calibration text"):
        text = calibrate(
            skeleton.checkpoint,
            spec.sources,
            samples=spec.samples,
            length=spec.length,
            context=skeleton.context,
            vocabulary=vocabulary,
            seed=seed,
            apart=spec.packing == "separate",
        )
    for note in text.notes:
        reporter.say(note)
    if spec.packing == "separate":
        marked_N = (text.samples_NL[:, 1:] >= START).any(1)
        LayerWalk(skeleton, [text.samples_NL[marked_N][:1]])  # refuses a model that cannot, before anything is written
    if len(text.samples_NL) > spec.samples or len(set(text.counts.values())) > 1:
        reporter.say(f"Calibration samples: {', '.join(f'{count} of {domain}' for domain, count in text.counts.items())}.")
    if len(text.samples_NL) < spec.samples:
        reporter.say(f"The calibration text gives {len(text.samples_NL)} of the {spec.samples} samples asked for.")
    return text


def _batches(text: Calibration, device: str, processes: Team) -> list[torch.Tensor]:
    """The batches of one process, whatever the number of processes: each takes some whole, if there is any text."""
    batches = text.batches(device)
    if batches:
        check_shared_out(len(batches), processes.count)
    return batches


def record_of(out: Path, inputs: dict[str, Any], recover: Recover | None) -> Record | None:
    """Return the record in `out` if it is of the same inputs, trained in the same way. Raises UserError where it is damaged."""
    record = Record.found(out)
    if record is None or not record.is_result_of(inputs, [] if recover is None else [recover.to_json()]):
        return None
    with reading(record.path):
        record.decisions, card.text(record), Plan.from_json(record.plan), record.metrics.items()  # all that is read of it later
    return record


def _refuse_other_result(out: Path, inputs: dict[str, Any]) -> None:
    """A finished result of other inputs is named as that: a folder that is not empty says less."""
    if (out / "config.json").is_file() and (record := Record.found(out)) is not None:
        other = record.other_inputs(inputs)
        what = f"another {other[0]}" if other else "other training"
        raise UserError(f"The output folder {out} holds a finished result made with {what}; give another folder.")


def _finished(out: Path, inputs: dict[str, Any], recover: Recover | None, source: Checkpoint) -> Result | None:
    """The result that `out` holds, if it is the finished one of the same inputs, trained in the same way. Raises UserError where it is no
    longer whole."""
    unfinished = (out / FOLDER).is_dir() and not (out / "config.json").is_file()
    record = None if unfinished else record_of(out, inputs, recover)
    if record is None:
        return None
    refuse_lost(out, lost(out, source))
    trained = {"recover": record.recovered[-1]["metrics"]} if record.recovered else {}
    return Result(out, record.decisions, {**record.metrics, **trained}, Plan.from_json(record.plan))


def _given_stats(path: str | os.PathLike[str] | None, about: dict[str, Any], skeleton: Skeleton, recipe: Recipe) -> Stats | None:
    if path is None:
        return None
    stats = Stats.load(Path(path))
    for what in ("model", "calibration", "dtype"):
        if about[what] != stats.about.get(what) and not (what == "calibration" and about[what] == NO_TEXT.fingerprint):
            raise UserError(f"The statistics file {path} was made for another {what}; gather it again, or leave --stats out.")
    first = recipe.steps[0]
    if "spectra" in first.needs:
        raise UserError("The recipe's first step needs singular values, which --stats files do not hold; leave --stats out.")
    return stats
