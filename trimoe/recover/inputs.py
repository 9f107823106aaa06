"""What a recovery is given: the finished folder, the original, the text. Everything that can be wrong with them is said here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint.atomic import refuse_odd
from trimoe.errors import UserError
from trimoe.model.skeleton import Skeleton
from trimoe.output.record import Record
from trimoe.progress import QUIET, Reporter
from trimoe.recipe.recover import Recover
from trimoe.recover import adapters
from trimoe.recover.pairs import pairs
from trimoe.recover.teacher import refuse_other_vocabulary
from trimoe.text.samples import Calibration, calibrate


def check(spec: Recover, skeleton: Skeleton, data: Any, seed: int) -> None:
    """What can be found before the folder is there that is to be trained. Raises UserError."""
    if spec.method in ("lora", "logits") and spec.train == "lora":
        adapters.import_peft()
    text_for(skeleton, data, spec, seed, QUIET)


def pruned(record: Record | None) -> frozenset[str]:
    """Return the scopes of the weight_prune steps that a finished folder, or a folder it was made from, went through."""
    scopes = set()
    for recipe in record.recipes if record is not None else []:
        for step in (recipe.get("steps") or []) if isinstance(recipe, Mapping) else []:
            body = step.get("weight_prune") if isinstance(step, Mapping) else None
            if isinstance(body, Mapping) and (body.get("ratio") or body.get("pattern")):
                scopes.add(str(body.get("scope", "experts")))
    return frozenset(scopes)


def went_over(record: Record | None, student: Skeleton) -> Callable[[str], bool]:
    """Return whether a pruning step is known to have gone over the parameter of a given full name."""
    scopes = pruned(record)
    experts = tuple(f"{student.layer_name(index)}.{site.block}.{site.experts}." for index, site in student.sites.items())
    blocks = tuple(f"{student.layer_name(index)}.{site.block}." for index, site in student.sites.items())
    reached = {"experts": experts, "moe": blocks, "all-linear": (f"{student.prefix}.",)}
    prefixes = tuple(prefix for scope in scopes for prefix in reached.get(scope, ()))
    return lambda name: name.startswith(prefixes) if prefixes else False


def why_held(record: Record | None) -> str:
    """Return what says that zeros were pruned, for people."""
    return "weight_prune made them" if pruned(record) else "they lie in the pattern of pruning"


def teacher_of(
    spec: Recover, given: str | os.PathLike[str] | None, record: Record, student: Skeleton, dtype: torch.dtype
) -> Skeleton | None:
    if spec.method in ("lora", "sft"):
        if given is not None:
            raise UserError(f"recover: {spec.method} learns from the text alone; leave the teacher out, or take method: logits.")
        return None
    teacher = Skeleton.of(str(given if given is not None else record.origin()), dtype)
    refuse_other_vocabulary(teacher, student)
    if spec.method == "experts":
        pairs(record, teacher, student)
    return teacher


def refuse_packed(spec: Recover, student: Skeleton) -> None:
    if student.checkpoint.scheme is not None and not spec.adapter:
        raise UserError(
            f"{student.name} has packed experts, which training cannot change; "
            "give --adapter (adapter=True) with method lora or logits, or recover first and quantise then."
        )
    if student.checkpoint.scheme is not None and spec.stream:
        raise UserError(f"{student.name} has packed experts, which stay packed in memory; stream: true is for plain weights, leave it out.")


def refuse_inside(out: Path, skeleton: Skeleton | None) -> None:
    if skeleton is None:
        return
    try:
        refuse_odd(out)
        str(out).encode()  # it is recorded
        source, target = skeleton.checkpoint.folder.resolve(), out.resolve()
        wrong = [parent for parent in target.parents if parent.exists() and not parent.is_dir()]
        target.exists()
    except UnicodeEncodeError:
        raise UserError(f"The name of the output {str(out)!a} is no UTF-8 text; give another.") from None
    except OSError as error:
        raise UserError(f"The output {str(out)[:200]} cannot be made: {error.strerror}.") from None
    if wrong:
        raise UserError(f"The output {out} cannot be made: {wrong[0]} is no folder.")
    if target == source or source in target.parents:
        raise UserError(f"The output folder {out} lies in the source model's folder, which is never written to.")


def text_for(student: Skeleton, calibration: Any, spec: Recover, seed: int, reporter: Reporter) -> tuple[Calibration, int]:
    """Training samples, shuffled, then held-out ones, from the last stretch of each text; and how many of the former there are. The text is
    that of the folder's `calibration` where `spec` names none."""
    data = spec.data or calibration or "builtin:mixed"
    if spec.length > student.context:
        reporter.say(f"Samples of {spec.length} tokens are cut to {student.context}, the model's context.")
    share = 1 - spec.holdout
    held = max(1, round(spec.samples * spec.holdout))
    train, kept = (
        calibrate(
            student.checkpoint, [data] if isinstance(data, str) else list(data), samples=count, length=spec.length,
            context=student.context, vocabulary=student.config.get_text_config().vocab_size, seed=seed, part=part,
            tokens=spec.samples * min(spec.length, student.context),
        ) for count, part in ((max(1, spec.samples - held), (0.0, share)), (held, (share, 1.0)))
    )  # fmt: skip
    count = len(train.samples_NL)
    for note in train.notes:
        reporter.say(note)
    if count + len(kept.samples_NL) < spec.samples:
        reporter.say(f"The text gives {count} of the {spec.samples - held} samples asked for, and {len(kept.samples_NL)} held out.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    samples_NL = torch.cat([train.samples_NL[order], kept.samples_NL])
    domains = (*(train.domains[place] for place in order.tolist()), *kept.domains)
    return Calibration(samples_NL, domains, train.fingerprint + kept.fingerprint), count
