"""The verb that judges: texts, lm-eval tasks and generation, original and result side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trimoe.cli.options import (
    AnyMemory,
    Device,
    Dtype,
    JsonFile,
    Model,
    Quiet,
    check_writable,
    command_line,
    names_of,
    reporter_of,
    write_json,
)


def evaluate(
    folder: Model,
    against: Annotated[str | None, typer.Option(help="the model to compare with; a trimoe folder's origin is taken by default")] = None,
    text: Annotated[list[str], typer.Option(help="file, name=path, wikitext2, ptb, data set (NAME:CONFIG/SPLIT#COLUMN), builtin:mixed, none; repeatable")] = [],
    length: Annotated[int, typer.Option(help="window, in tokens (cut to the model's context)")] = 2048,
    stride: Annotated[int | None, typer.Option(help="how far windows advance; half the window by default")] = None,
    tokens: Annotated[int, typer.Option(help="scored tokens of each text, to the end of a window")] = 32768,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma between: names, groups, moe-i2-nine, blimp=FILE.jsonl, rte3=FILE.jsonl")] = "",
    limit: Annotated[int | None, typer.Option(help="documents of each task, at most")] = None,
    fewshot: Annotated[int | None, typer.Option(help="examples in a task's prompt; the task's own number by default")] = None,
    include: Annotated[list[Path], typer.Option(help="a folder of lm-eval task files (YAML, whose functions are run); repeatable")] = [],
    batch: Annotated[int, typer.Option(help="task requests at once, in memory")] = 8,
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="tasks layer by layer; by default where a model does not fit in memory")] = None,
    generate: Annotated[bool | None, typer.Option("--generate/--no-generate", help="continue prompts from the texts; by default with small models")] = None,
    cached: Annotated[bool, typer.Option("--cache/--no-cache", help="take what was measured before from ~/.cache/trimoe/eval or $TRIMOE_CACHE")] = True,
    device: Device = "cpu", dtype: Dtype = "auto", any_memory: AnyMemory = False, json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Perplexity on each text, KL and agreement against the original, lm-eval tasks, what it writes. Both models are streamed."""
    import trimoe
    from trimoe import UserError, team
    from trimoe.evaluate.cache import default_folder
    from trimoe.output import card
    from trimoe.output.record import Record
    from trimoe.progress import LOG, logged
    from trimoe.show import results

    check_writable(json_file)
    if "none" in text and len(text) > 1:
        raise UserError("--text none leaves texts out, so it cannot stand beside another --text.")
    reporter = reporter_of(quiet)
    made = Record.beside(Path(folder))
    if against is None and made is not None:
        try:
            against = made.origin()
        except UserError as reason:
            print(f"trimoe: It is evaluated alone, not against the model it was made from: {reason}", file=sys.stderr)  # also with -q
    kept = team.speaks() and made is not None and made.made_from(against)
    if kept:
        card.check(Record.read(Path(folder)))
    with logged(reporter, Path(folder) / LOG, command_line(), main=kept):
        report = trimoe.evaluate(
            folder, against=against, text=[] if text == ["none"] else text or ["builtin:mixed"], length=length, stride=stride, tokens=tokens,
            tasks=names_of(tasks), limit=limit, fewshot=fewshot, include=include, batch=batch,
            stream=stream, generate=generate, device=device, dtype=dtype, any_memory=any_memory, cache=default_folder() if cached else None,
            reporter=reporter,
        )  # fmt: skip
    write_json(json_file, report)
    if kept:
        card.keep(Record.read(Path(folder)).with_evaluation(report, command_line()))
    results.evaluation(report)
