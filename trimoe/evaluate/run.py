"""The whole job: texts, tasks and generation of one model, or of two side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimoe.checkpoint.folder import Checkpoint
from trimoe.errors import UserError
from trimoe.evaluate import generation, harness, taskset, texts
from trimoe.evaluate.cache import ResultCache
from trimoe.evaluate.texts import Ends
from trimoe.model.precision import compute_dtype, dtype_name
from trimoe.model.skeleton import Skeleton
from trimoe.plan import memory
from trimoe.progress import QUIET, Reporter
from trimoe.show.format import listed
from trimoe.text.samples import load_tokenizer, opening
from trimoe.walk.walk import usable_device


def evaluate(
    model: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str] | None = None,
    text: str | Sequence[str] = ("builtin:mixed",),
    length: int = 2048,
    stride: int | None = None,
    tokens: int = 32768,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    include: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    batch: int = 8,
    stream: bool | None = None,
    generate: bool | None = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    any_memory: bool = False,
    cache: str | os.PathLike[str] | None = None,
    ends: Ends | None = None,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Perplexity of `model` on each text and, with `against`, mean KL(against || model) in nats per token and top-1 agreement, all with
    95 % intervals; lm-eval tasks; what both write.

    `length` is cut to the model's context (what the tokenizer opens every text with stands before every window, and is neither scored nor
    counted); `stride` (default half of it) is stated in the result; `tokens` tokens of each text are scored,
    and those that are left of the last window. `tasks` are lm-eval's, `moe-i2-nine`, or `FORM=FILE` (taskset.py), `limit` documents of
    each, with task files from the folders `include`; `stream` runs them layer by layer (None: where a model does not fit in memory).
    `generate`: whether prompts from the texts are continued (None: if the models are small). `any_memory`: begin even where one layer takes
    more memory than there is. `cache`: a folder of earlier results. `ends`: keeps what the original computed for the next call (texts.py).
    Returns the JSON that `trimoe eval --json` writes. Raises UserError for what is not there or not allowed.
    """
    text, tasks, include = listed(text), listed(tasks), listed(include)
    device = str(device)
    least = {
        "length": (length, 2),
        "stride": (stride, 1),
        "tokens": (tokens, 1),
        "limit": (limit, 1),
        "fewshot": (fewshot, 0),
        "batch": (batch, 1),
    }
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise UserError(f"The evaluation's {name} is {value}; at least {smallest} is needed.")
    if not text and not tasks:
        raise UserError("There is nothing to evaluate on; give a text (builtin:mixed is one) or tasks.")
    taskset.check_asked(tasks, limit=limit, fewshot=fewshot, include=include, stream=stream)
    usable_device(device)
    precision = compute_dtype(dtype, device)
    checkpoint = Checkpoint.open(model)
    skeleton = Skeleton(checkpoint, precision)
    other = Skeleton.of(str(against), precision) if against is not None else None
    vocabulary = skeleton.config.get_text_config().vocab_size
    if other is not None and other.config.get_text_config().vocab_size != vocabulary:
        raise UserError(
            f"{skeleton.name} and {other.name} have different vocabularies ({vocabulary} and {other.config.get_text_config().vocab_size} tokens)."
        )
    for one in () if any_memory else filter(None, (skeleton, other)):
        memory.of_evaluation(one, device).refuse(device)
    tokenizer = load_tokenizer(checkpoint)
    sets = texts.of_sources(skeleton, tokenizer, text, length, stride, tokens)
    first = len(opening(tokenizer)) if text else 0
    length, stride = texts.sizes(skeleton, length, stride, first)
    found, how = taskset.TaskSet(), harness.How(limit=limit, batch=batch, stream=stream, device=device)
    if tasks:  # what cannot be had is said before hours of work
        found = taskset.find(tasks, include, fewshot, reporter)
        harness.check(found, how)
    kept = ResultCache(Path(cache) if cache is not None else None)
    report: dict[str, Any] = {
        "model": skeleton.name, "against": other.name if other else None, "length": length, "stride": stride,
        "dtype": dtype_name(precision), "texts": [],
    }  # fmt: skip
    if sets:
        made = texts.measure(skeleton, other, sets, device=device, cache=kept, ends=ends, reporter=reporter)
        report["texts"] = texts.rows(sets, made["sums"])
        if other is not None:
            report["mean_kl"] = sum(row["kl"] for row in report["texts"]) / len(report["texts"])
        report["traffic"] = made["traffic"]
    models = {"model": skeleton} | ({"against": other} if other else {})
    if tasks:
        report |= harness.compare(found, models, how, cache=kept, reporter=reporter)
    if sets and (generate or (generate is None and generation.small(models.values(), device))):
        written = generation.smoke(models, sets, tokenizer, device=device, reporter=reporter)
        report |= {"generation": written} if written is not None else {}
    return report
