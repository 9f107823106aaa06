"""Verbs that look at models, plans and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trimoe.cli.garbage import uncollected
from trimoe.cli.options import (
    Changes,
    Device,
    Dtype,
    JsonFile,
    JsonFlag,
    Length,
    Model,
    Quiet,
    RecipeName,
    Samples,
    Texts,
    check_writable,
    command_line,
    reporter_of,
    write_json,
)


def inspect(model: Model, as_json: JsonFlag = False) -> None:
    """Structure, bytes by part and what can be done, from configuration and headers alone."""
    from trimoe.plan import inspection
    from trimoe.show import plan as plan_table
    from trimoe.show import table

    with uncollected():
        about = inspection.inspect(model)
    if as_json:
        print(json.dumps(about, indent=1))
    else:
        table.show(plan_table.of_model(about))


def plan(
    model: Model, recipe: RecipeName, changes: Changes = [], calibration: Texts = [], samples: Samples = None, length: Length = None,
    stats: Annotated[Path | None, typer.Option(help="a file written by trimoe stats: how stable its choices are, expert-parallel traffic")] = None,
    device: Device = "cpu", dtype: Dtype = "auto", as_json: JsonFlag = False,
) -> None:  # fmt: skip
    """Sizes before and after, what a token costs, what will load the result, how often the model is read. Reads no weight."""
    from dataclasses import replace

    import trimoe
    from trimoe.plan.from_statistics import known
    from trimoe.plan.passes import passes
    from trimoe.plan.plan import skeleton_for
    from trimoe.recipe.recipe import load, with_calibration
    from trimoe.show import plan as plan_table
    from trimoe.show import table
    from trimoe.text.samples import check_here, most_tokens
    from trimoe.walk.walk import check_device

    check_device(device)
    parsed = with_calibration(load(recipe, changes), calibration, samples, length)
    for source in parsed.calibration.sources:
        check_here(source)
    with uncollected():
        skeleton = skeleton_for(model, [parsed], dtype, device, weights=False)
        made, traffic = trimoe.plan(skeleton, parsed, device=device), None
    if stats is not None:
        warnings, traffic = known(skeleton, parsed, stats, reporter_of(False))
        made = replace(made, warnings=[*made.warnings, *warnings])
    spec = parsed.calibration
    tokens = most_tokens(spec.sources, spec.samples, min(spec.length, skeleton.context))
    body = made.to_json() | {"traffic": traffic, "passes": passes(skeleton, parsed, tokens)}
    if as_json:
        print(json.dumps(body, indent=1))
    else:
        table.show(plan_table.of_plan(body))


def bench(
    folder: Model,
    against: Annotated[str | None, typer.Option(help="the model to compare with, measured in turns")] = None,
    prompt: Annotated[int, typer.Option(help="tokens in the prompt")] = 128,
    generate: Annotated[int, typer.Option(help="new tokens")] = 64,
    batch: Annotated[int, typer.Option(help="prompts at once")] = 1,
    rounds: Annotated[int, typer.Option(help="measurements of each model")] = 5,
    backend: Annotated[str, typer.Option(help="how packed experts run; auto: on their stored numbers. int8-dynamic rounds activations too")] = "auto",
    device: Device = "cpu", dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: each checkpoint's own")] = "auto",
    json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Tokens per second, time to the first token and memory, here; against another model in turns. Against the original of a trimoe
    folder, the numbers are kept in its trimoe.json."""
    import trimoe
    from trimoe import team
    from trimoe.output import card
    from trimoe.output.record import Record
    from trimoe.progress import LOG, logged
    from trimoe.show import results

    check_writable(json_file)
    made = Record.beside(Path(folder))
    kept = team.speaks() and made is not None and made.made_from(against)
    if kept:
        card.check(Record.read(Path(folder)))
    reporter = reporter_of(quiet)
    with logged(reporter, Path(folder) / LOG, command_line(), main=kept):
        report = trimoe.bench(
            folder, against, prompt=prompt, generate=generate, batch=batch, rounds=rounds, device=device, dtype=dtype, backend=backend,
            reporter=reporter,
        )  # fmt: skip
    write_json(json_file, report)
    if kept:
        card.keep(Record.read(Path(folder)).with_bench(report, command_line()))
    results.bench(report)


def recipes(name: Annotated[str | None, typer.Argument(help="print this one", show_default=False)] = None) -> None:
    """The built-in recipes; with a name, one of them as YAML ready to edit."""
    from trimoe.recipe import recipe

    if name is not None:
        print(recipe.text_of(name), end="")
        return
    for known in recipe.names():
        print(f"{known:<20} {recipe.text_of(known).splitlines()[0].lstrip('# ')}")
