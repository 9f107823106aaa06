"""Many variants of one recipe on one model: planned together, compressed from shared statistics, evaluated, compared.

What lies in the folder: NAME.yaml (a variant's recipe), NAME/ (the variant; trimoe.json alone once its weights have gone), sweep.json and
sweep.csv, sweep.html with the frontier. The state that a killed sweep goes on from is these files themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from trimoe import team
from trimoe.checkpoint import free_disk
from trimoe.checkpoint.atomic import write_text
from trimoe.checkpoint.side_files import RECORD
from trimoe.checkpoint.whole import lost
from trimoe.compress import Job, job_of, possible, record_of, text_of, with_calibration
from trimoe.errors import UserError
from trimoe.evaluate import harness, taskset
from trimoe.evaluate.run import evaluate
from trimoe.evaluate.texts import Ends, of_sources
from trimoe.journal import Journal
from trimoe.model.precision import dtype_name
from trimoe.output import card
from trimoe.output.record import Record
from trimoe.plan import disk
from trimoe.plan.plan import Plan, skeleton_for
from trimoe.progress import LOG, QUIET, Reporter, logged
from trimoe.recipe.recipe import Recipe
from trimoe.show.format import counted, duration, listed
from trimoe.sweep.grid import Variant, variants
from trimoe.sweep.rows import Row, frontier, plot, write_tables
from trimoe.sweep.statistics import Shared
from trimoe.text.samples import Calibration, load_tokenizer, read_text
from trimoe.version import VERSION
from trimoe.walk.hidden_states import BUDGET

KEEPS = ("none", "frontier", "all")
HELD = 16 << 30  # bytes of the original's hidden states that are kept in temporary files


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. `rows` are in the order of the recipe's lists; `failed` says why, by name, where a variant could not be made."""

    out: Path
    rows: list[Row]
    failed: dict[str, str]

    @property
    def best(self) -> list[Row]:
        """The variants that no other beats in bytes and in KL."""
        return [row for row in self.rows if row.name in frontier(self.rows)]


def sweep(
    model: str | os.PathLike[str],
    recipe: Any,
    out: str | os.PathLike[str],
    *,
    changes: str | Sequence[str] = (),
    calibration: str | Sequence[str] = (),
    samples: int | None = None,
    length: int | None = None,
    text: str | Sequence[str] = ("builtin:mixed",),
    tokens: int = 32768,
    window: int = 2048,
    stride: int | None = None,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    include: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    keep: str = "none",
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    any_memory: bool = False,
    command: str | None = None,
    reporter: Reporter = QUIET,
) -> Sweep:
    """Compress `model` by every variant of `recipe`, evaluate each against the original, and compare: sweep.csv, .json, .html in `out`.

    recipe          as for compress, or a list of several, or a mapping from names to recipes; any field may be a list of values
                    (docs/sweep.md)
    changes, calibration, samples, length, seed, device, dtype, any_memory   as for compress
    text, tokens, stride, tasks, limit, include, cache   as for evaluate; `window` is its length. Without a `cache` folder the original runs
                    the tasks again for every variant
    keep            whose weights stay: `none`, `frontier` (variants that no other beats in bytes and KL), `all`
    Killed and called again it goes on; called again with more values it makes only what is new.
    Raises UserError before anything is written if any variant is impossible, and at the end if one failed nevertheless.
    """
    out, started, reporter = Path(out), time.monotonic(), reporter.fresh()
    device = str(device)
    changes, text, tasks, include = listed(changes), listed(text), listed(tasks), listed(include)
    if keep not in KEEPS:
        raise UserError(f"keep is {keep!r}; {', '.join(KEEPS)} are known.")
    for name, value, least in (
        ("window", window, 2),
        ("stride", 1 if stride is None else stride, 1),
        ("tokens", tokens, 1),
        ("limit", 1 if limit is None else limit, 1),
    ):
        if value < least:
            raise UserError(f"The evaluation's {name} is {value}; at least {least} is needed.")
    taskset.check_asked(tasks, limit=limit, include=include)
    if team.launched():
        raise UserError("trimoe sweep runs in one process; start it without torchrun, or compress the variants one by one.")
    if not text:
        raise UserError("A sweep compares by KL on held-out text; give at least one (builtin:mixed is one).")
    several = isinstance(recipe, list | tuple) or (isinstance(recipe, dict) and "steps" not in recipe)
    found = variants(recipe if several else [recipe], changes)
    skeleton = skeleton_for(str(model), [variant.recipe() for variant in found], dtype, device)
    precision = dtype_name(skeleton.dtype)

    def planned(variant: Variant) -> tuple[Recipe, Plan]:
        parsed = with_calibration(variant.recipe(), calibration, samples, length)
        return parsed, possible(skeleton, parsed, out, device, any_memory)

    plans = _all(found, planned)
    tokenizer = load_tokenizer(skeleton.checkpoint)
    held = Ends.nbytes(skeleton, of_sources(skeleton, tokenizer, text, window, stride, tokens))  # what cannot be evaluated on is said now
    asked = taskset.find(tasks, include, None, reporter) if tasks else None  # a name or data that are not there, too
    read: dict[str, Calibration] = {}

    def ready(variant: Variant) -> Job:
        parsed, _ = plans[variant.name]
        spec = json.dumps([parsed.to_json()["calibration"], parsed.reads_text])
        if spec not in read:
            read[spec] = text_of(skeleton, parsed, seed, reporter)
        command = _command(model, out, variant, seed, device, precision)
        return job_of(skeleton, parsed, read[spec], seed, device, command, reporter)

    jobs = _all(found, ready)
    settings = {"text": list(text), "documents": _fingerprint(text, tokens), "tokens": tokens, "window": window, "stride": stride}
    settings |= {"tasks": harness.task_settings(asked, limit)} if asked is not None else {}
    inputs = {"model": skeleton.checkpoint.fingerprint, "seed": seed, "dtype": precision, "evaluation": settings, "version": VERSION}

    entries = [VariantJob(variant, out / variant.name, jobs[variant.name], plans[variant.name][1]) for variant in found]
    unmeasured = sum(not entry.measured() for entry in entries)
    ends = Ends() if unmeasured > 1 and held <= HELD else None  # the original is walked once, not for every variant

    def score(folder: Path) -> dict[str, Any]:
        return evaluate(
            folder, against=str(model), text=text, length=window, stride=stride, tokens=tokens, tasks=tasks, limit=limit, include=include, device=device,
            dtype=skeleton.dtype, cache=cache, ends=ends, reporter=reporter,
        )  # fmt: skip

    journal = Journal(out, inputs, of="a sweep")
    journal.refuse_other_content()
    for entry in entries:
        entry.refuse_other()
    shared = Shared(out, {entry.variant.name: entry.job.run for entry in entries}, reporter)
    race = _Race(out, entries, score, keep, command, reporter, started, shared)
    todo = race.to_make()
    walked = max(0, held - BUDGET)  # of one model over the evaluated texts
    evaluating = (2 * walked if ends is None else held + walked) if unmeasured else 0
    spill = max((entry.plan.spill for entry in todo), default=0) + (held if ends is not None else 0)
    statistics = (
        shared.nbytes({entry.variant.name: entry.plan.disk_split.get(disk.STATISTICS, 0) for entry in entries}) if unmeasured else 0
    )
    free_disk.check(out, _room(todo, keep) + statistics, max(spill, evaluating), left=0)
    reporter.say(f"{counted(len(entries), 'variant')}, {len(todo)} of them to be made.")
    if others := _of_other_lists(out, {entry.variant.name for entry in entries}):
        reporter.say(
            f"{out} holds {counted(len(others), 'variant')} of other lists, too, which this sweep's tables leave out ({', '.join(others)}); "
            "delete their folders if they are no longer wanted."
        )
    with journal, logged(reporter, out / LOG, command or f"trimoe.sweep of {model} into {out}"):
        for entry in entries:
            body = yaml.safe_dump(entry.job.recipe.to_json(), sort_keys=False)
            write_text(out / f"{entry.variant.name}.yaml", body)
        return race.run()


@dataclass(frozen=True)
class VariantJob:
    """A variant on its way through the sweep; where it stands is what its folder holds."""

    variant: Variant
    folder: Path
    job: Job
    plan: Plan

    def record(self) -> Record | None:
        return record_of(self.folder, self.job.inputs, self.job.recipe.recover)

    def refuse_other(self) -> None:
        if (self.folder / RECORD).is_file() and self.record() is None:
            raise UserError(f"{self.folder} holds a result of the same name and another recipe; give another folder.")

    def measured(self) -> bool:
        record = self.record()
        return record is not None and bool(record.texts)

    def kept(self) -> bool:
        """Whether the weights are there."""
        return self.record() is not None and (self.folder / "config.json").is_file()

    def complete(self) -> bool:
        """The same, and whether they are whole: every header is read."""
        return self.kept() and lost(self.folder, self.job.run.skeleton.checkpoint) is None

    def discard(self) -> None:
        """Delete all but the record and the log, config.json first: without it no half-deleted folder looks finished."""
        (self.folder / "config.json").unlink(missing_ok=True)
        for path in sorted(self.folder.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (RECORD, LOG):
                path.unlink()

    def row(self) -> Row:
        record = self.record()
        assert record is not None
        return Row.of(self.variant, record, kept=self.kept())


@dataclass(frozen=True)
class _Race:
    out: Path
    entries: list[VariantJob]
    score: Callable[[Path], dict[str, Any]]
    keep: str
    command: str | None
    reporter: Reporter
    started: float
    shared: Shared

    def to_make(self) -> list[VariantJob]:
        """Those without numbers, and those whose weights have gone and are to be kept after all."""
        again = [entry for entry in self._kept() if not entry.complete()]
        return [entry for entry in self.entries if not entry.measured() or entry in again]

    def run(self) -> Sweep:
        """Make and measure what is not yet; then have the weights there that are to be kept, and no others."""
        failed: dict[str, str] = {}
        done = 0
        open_ = [entry for entry in self.entries if not entry.measured()]
        shared = self.shared.files({entry.variant.name for entry in open_})
        start = time.monotonic()
        for entry in self.entries:
            name = entry.variant.name
            try:
                if not entry.measured():
                    self._make(entry, shared.get(name))
                    card.keep(Record.read(entry.folder).with_evaluation(self.score(entry.folder)))
                    done += 1
                    left = (time.monotonic() - start) / done * (len(open_) - done)
                    self.reporter.say(f"[{done}/{len(open_)}] {entry.row()}" + (f"; about {duration(left)} left" if left else ""))
                    self._tidy()
            except UserError as mistake:
                failed[name] = str(mistake)
                self.reporter.say(f"{name} failed: {mistake}")
        for entry in self._kept():
            if not entry.complete():
                self._remake(entry, shared.get(entry.variant.name))
        self._tidy()
        rows = self._rows()
        failed |= {row.name: f"its KL to the original is {row.kl}" for row in rows if not math.isfinite(row.kl)}
        plot(self.out, rows, self.reporter)
        self.reporter.say(f"Wrote {self.out}/sweep.csv and sweep.json in {duration(time.monotonic() - self.started)}.")
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.entries)} variants failed: {'; '.join(f'{n}: {why}' for n, why in failed.items())}"
            )
        return Sweep(self.out, rows, failed)

    def _make(self, entry: VariantJob, stats: Path | None) -> None:
        if entry.record() is not None and not entry.complete():
            shutil.rmtree(entry.folder)  # the record of weights that are no longer there
        entry.job.done(entry.folder, entry.plan, stats)

    def _remake(self, entry: VariantJob, stats: Path | None) -> None:
        """The weights of a variant that was measured before its weights went; it is not evaluated again."""
        record = entry.record()
        assert record is not None
        self._make(entry, stats)
        card.keep(Record.read(entry.folder).with_evaluation(record.evaluation))

    def _rows(self) -> list[Row]:
        return [entry.row() for entry in self.entries if entry.measured()]

    def _kept(self) -> list[VariantJob]:
        best = frontier(self._rows())
        wanted = {"none": set(), "frontier": best, "all": {entry.variant.name for entry in self.entries}}[self.keep]
        return [entry for entry in self.entries if entry.measured() and entry.variant.name in wanted]

    def _tidy(self) -> None:
        """Weights that are not to be kept go; the tables say how things stand."""
        kept = [entry.variant.name for entry in self._kept()]
        for entry in self.entries:
            if entry.measured() and entry.variant.name not in kept:
                entry.discard()
        write_tables(self.out, self._rows(), [entry.variant.name for entry in self.entries if not entry.measured()], self.command)


def _of_other_lists(out: Path, asked: set[str]) -> list[str]:
    """Variants that an earlier sweep in the folder made and that are not asked for now."""
    return sorted(path.stem for path in out.glob("*.yaml") if path.stem not in asked and (out / path.stem / RECORD).is_file())


def _all(found: Sequence[Variant], work: Callable[[Variant], Any]) -> dict[str, Any]:
    """work(variant) by name. Raises one UserError that names every variant that is impossible."""
    made, wrong = {}, {}
    for variant in found:
        try:
            made[variant.name] = work(variant)
        except UserError as mistake:
            wrong[variant.name] = str(mistake)
    if len(found) == 1 and wrong:
        raise UserError(next(iter(wrong.values())))
    if wrong:
        lines = "".join(f"\n  {name}: {why}" for name, why in wrong.items())
        raise UserError(f"{len(wrong)} of {len(found)} variants are not possible, so none was begun:{lines}")
    return made


def _room(todo: Sequence[VariantJob], keep: str) -> int:
    """Bytes still to be written that are on the disk at once, at most: of all results that may stay, or of one, and beside them what one
    variant needs until it is done. What a killed sweep left of a variant counts for that variant alone."""
    stays = [entry.plan.disk_split["result"] + entry.plan.disk_split[disk.BESIDE] for entry in todo]
    results = [max(0, nbytes - free_disk.size(entry.folder)) for nbytes, entry in zip(stays, todo, strict=True)]
    beside = [entry.plan.disk - nbytes for nbytes, entry in zip(stays, todo, strict=True)]
    if keep == "none":
        return max((result + more for result, more in zip(results, beside, strict=True)), default=0)
    return sum(results) + max(beside, default=0)


def _command(model: Any, out: Path, variant: Variant, seed: int, device: str, dtype: str) -> str:
    """What makes the variant again, in a folder beside the sweep's, where the sweep was started: paths are as they were given, those in the
    recipe too."""
    again = f"{out}-{variant.name}"
    words = ["--recipe", str(out / f"{variant.name}.yaml"), "--out", again, "--seed", str(seed), "--device", device, "--dtype", dtype]
    return shlex.join(["trimoe", "compress", str(model), *words])


def _fingerprint(text: Sequence[str], tokens: int) -> str:
    """Of the documents that are evaluated on."""
    parts = [(part.domain, part.documents) for source in text for part in read_text(source, "eval", tokens=tokens)]
    return hashlib.sha256(json.dumps(parts, default=vars).encode()).hexdigest()[:32]
