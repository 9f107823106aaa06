"""Verbs that make something: statistics, compressed and trained folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimoe.cli import show
from trimoe.cli.options import (
    AnyMemory,
    Changes,
    Device,
    Dtype,
    JsonFile,
    Length,
    Model,
    Quiet,
    RecipeName,
    Samples,
    Seed,
    Texts,
    check_writable,
    command_line,
    names_of,
    print_plan,
    reporter_of,
    write_json,
)


def stats(
    model: Model, out: Annotated[Path, typer.Option(help="the statistics file to write")], calibration: Texts = [], samples: Samples = None,
    length: Length = None, seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "auto", any_memory: AnyMemory = False, quiet: Quiet = False,
) -> None:  # fmt: skip
    """The statistics pass alone; compress --stats then starts from the file."""
    import trimoe

    made = trimoe.gather_statistics(
        model,
        out,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        dtype=dtype,
        any_memory=any_memory,
        reporter=reporter_of(quiet),
    )
    print(f"Wrote {out}: statistics of {len(made.layers)} MoE layers.")


def compress(
    model: Model, recipe: RecipeName, out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    changes: Changes = [], calibration: Texts = [], samples: Samples = None, length: Length = None, seed: Seed = 0,
    stats: Annotated[Path | None, typer.Option(help="a file written by trimoe stats")] = None, device: Device = "cpu",
    dtype: Dtype = "auto", any_memory: AnyMemory = False, json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compress a model into a new folder. Killed and run again with the same arguments, it resumes."""
    import trimoe

    check_writable(json_file, out)

    result = trimoe.compress(
        model, recipe, out, changes=changes, calibration=calibration, samples=samples, length=length, seed=seed, stats=stats,
        device=device, dtype=dtype, any_memory=any_memory, command=command_line(), reporter=reporter_of(quiet),
    )  # fmt: skip
    write_json(json_file, {"out": str(result.out), "plan": result.plan.to_json(), "metrics": result.metrics})
    print_plan(result.plan)


def sweep(
    model: Model, recipe: Annotated[list[str], typer.Option("--recipe", "-r", help="a built-in recipe or a YAML file; fields may be lists; repeatable")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    changes: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="recipe fields, e.g. 'steps.0.ratio=[0.1,0.25]'")] = [],
    calibration: Texts = [], samples: Samples = None, length: Length = None,
    text: Annotated[list[str], typer.Option(help="held-out text to evaluate on, as for trimoe eval; repeatable")] = [],
    tokens: Annotated[int, typer.Option(help="scored tokens of each text, to the end of a window")] = 32768,
    window: Annotated[int, typer.Option(help="evaluated windows, in tokens (cut to the model's context)")] = 2048,
    stride: Annotated[int | None, typer.Option(help="how far windows advance; half the window by default")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma between, as for trimoe eval")] = "",
    limit: Annotated[int | None, typer.Option(help="documents of each task, at most")] = None,
    include: Annotated[list[Path], typer.Option(help="a folder of lm-eval task files (YAML, whose functions are run); repeatable")] = [],
    keep: Annotated[str, typer.Option(help="whose weights stay: none, frontier (variants that no other beats), all")] = "none",
    seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "auto", any_memory: AnyMemory = False, json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compress and evaluate every variant of a recipe: a table, sweep.csv, sweep.json and the frontier. Run again, it goes on."""
    import trimoe
    from trimoe.evaluate.cache import default_folder
    from trimoe.sweep import rows

    check_writable(json_file, out)
    found = trimoe.sweep(
        model, list(recipe), out, changes=changes, calibration=calibration, samples=samples, length=length, text=text or ["builtin:mixed"],
        tokens=tokens, window=window, stride=stride, tasks=names_of(tasks), limit=limit, include=include,
        keep=keep, cache=default_folder(), seed=seed, device=device, dtype=dtype, any_memory=any_memory, command=command_line(),
        reporter=reporter_of(quiet),
    )  # fmt: skip
    write_json(json_file, {"out": str(found.out), "variants": [row.__dict__ for row in found.rows]})
    rows.table(found.rows)


def recover(
    folder: Annotated[str, typer.Argument(help="a finished folder", show_default=False)],
    method: Annotated[str, typer.Option(help="lora, logits, router or experts")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    teacher: Annotated[str | None, typer.Option(help="the original; by default the model that trimoe.json names")] = None,
    data: Annotated[list[str], typer.Option(help="training text, as for calibration; repeatable. The recipe's calibration text by default")] = [],
    samples: Annotated[int | None, typer.Option(help="sequences, a part of them held out")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a sequence (cut to the model's context)")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the samples")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps, at most")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="keep the adapters instead of merging them")] = False,
    changes: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="any other field, e.g. rate=1e-4, rank=32, train=full")] = [],
    dtype: Annotated[str | None, typer.Option(help="what the model computes in: float32 or bfloat16; by default as stored on a GPU, else float32")] = None,
    seed: Seed = 0, device: Device = "cpu", any_memory: AnyMemory = False, json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a compressed model to win back quality. Killed and run again with the same arguments, it resumes."""
    import trimoe
    from trimoe.recipe import recipe

    check_writable(json_file, out)
    given = {
        "data": list(data) or None,
        "samples": samples,
        "length": length,
        "epochs": epochs,
        "steps": steps,
        "adapter": adapter or None,
        "dtype": dtype,
    }
    body = {"method": method, **{key: value for key, value in given.items() if value is not None}}
    made = trimoe.recover(
        folder,
        out,
        recipe.recovery(body, changes),
        teacher=teacher,
        seed=seed,
        device=device,
        any_memory=any_memory,
        command=command_line(),
        reporter=reporter_of(quiet),
    )
    write_json(json_file, {"out": str(made.out), "metrics": made.metrics})
    for name, before in made.metrics["before"].items():
        print(f"{name.replace('_', ' ')} on held-out text: {before:.4g} -> {made.metrics['after'][name]:.4g}")


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")] = Path("demo-mini-mixtral"),
    model: Annotated[str, typer.Option(help="which built-in model")] = "builtin:mini-mixtral", quiet: Quiet = False,
) -> None:  # fmt: skip
    """The main job on a built-in model: MoE-I2, evaluated before and after on held-out text, and the report on it."""
    import trimoe
    from trimoe import UserError, team
    from trimoe.output import card
    from trimoe.output.record import Record
    from trimoe.show import results

    reporter = reporter_of(quiet)
    result = trimoe.compress(model, "moe-i2", out, command=command_line(), reporter=reporter)
    report = trimoe.evaluate(out, against=model, reporter=reporter)
    if team.speaks():
        card.keep(Record.read(out).with_evaluation(report, command_line()))
    print_plan(result.plan)
    results.evaluation(report)
    print(f"The compressed model lies in {out.resolve()}; load it with: import trimoe; model = trimoe.load({str(out)!r})")
    if team.speaks():
        try:
            show.report([str(out)])
        except UserError as reason:  # a core install has no charts
            print(f"No report: {reason}")
