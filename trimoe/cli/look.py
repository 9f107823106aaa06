"""Verbs that look at models, plans and results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trimoe.cli.options import (
    Changes,
    Device,
    JsonFile,
    JsonFlag,
    Length,
    Model,
    Quiet,
    RecipeName,
    Samples,
    check_writable,
    reporter_of,
    write_json,
)


def inspect(model: Model, as_json: JsonFlag = False) -> None:
    """Structure, bytes by part and what can be done, from configuration and headers alone."""
    from trimoe import inspection

    about = inspection.inspect(model)
    print(json.dumps(about, indent=1) if as_json else inspection.table(about))


def plan(
    model: Model, recipe: RecipeName, changes: Changes = [], samples: Samples = None, length: Length = None, as_json: JsonFlag = False
) -> None:
    """Sizes before and after, and what will load the result. Reads no weight."""
    import trimoe

    made = trimoe.plan(model, recipe, changes, samples=samples, length=length)
    print(json.dumps(made.to_json(), indent=1) if as_json else made)


def bench(
    folder: Model,
    against: Annotated[str | None, typer.Option(help="the model to compare with, measured in turns")] = None,
    prompt: Annotated[int, typer.Option(help="tokens in the prompt")] = 128,
    generate: Annotated[int, typer.Option(help="new tokens")] = 64,
    batch: Annotated[int, typer.Option(help="prompts at once")] = 1,
    rounds: Annotated[int, typer.Option(help="measurements of each model")] = 5,
    backend: Annotated[str, typer.Option(help="how packed experts run: auto, int8-dynamic, int4-weight-only ...")] = "auto",
    device: Device = "cpu", dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: each checkpoint's own")] = "auto",
    json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Tokens per second, time to the first token and memory, here; against another model in turns. Against the original of a trimoe
    folder, the numbers are kept in its trimoe.json."""
    import trimoe
    from trimoe import card, distributed, tables

    check_writable(json_file)
    report = trimoe.bench(
        folder, against, prompt=prompt, generate=generate, batch=batch, rounds=rounds, device=device, dtype=dtype, backend=backend,
        reporter=reporter_of(quiet),
    )  # fmt: skip
    tables.bench(report)
    if distributed.speaks() and card.is_original(Path(folder), against):
        card.add_bench(Path(folder), report)
    write_json(json_file, report)


def recipes(name: Annotated[str | None, typer.Argument(help="print this one", show_default=False)] = None) -> None:
    """The built-in recipes; with a name, one of them as YAML ready to edit."""
    from trimoe import recipe

    if name is not None:
        print(recipe.text_of(name), end="")
        return
    for known in recipe.names():
        print(f"{known:<20} {recipe.text_of(known).splitlines()[0].lstrip('# ')}")
