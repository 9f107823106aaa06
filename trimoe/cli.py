"""The command line. Exit code 0: done; 2: the user's mistake, one sentence; 1: anything else."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, help="Make Mixture-of-Experts models smaller.")

Model = Annotated[str, typer.Argument(help="a folder, a hub id, or builtin:NAME", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="a built-in recipe (see trimoe recipes) or a YAML file")]
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a recipe field, e.g. steps.0.ratio=0.5")]
Texts = Annotated[
    list[str], typer.Option("--calibration", "-c", help="text or jsonl file, name=path, datasets id, builtin:mixed; repeatable")
]
Samples = Annotated[int | None, typer.Option(help="calibration samples")]
Length = Annotated[int | None, typer.Option(help="tokens in a sample (cut to the model's context)")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="precision the layers run in: float32, bfloat16, float16 (the result keeps the source's)")]
JsonFlag = Annotated[bool, typer.Option("--json", help="JSON on standard output")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def _reporter(quiet: bool) -> Any:
    from trimoe.progress import Reporter

    return Reporter("quiet" if quiet else "auto")


def _command() -> str:
    return shlex.join(["trimoe", *sys.argv[1:]])


@app.command()
def inspect(model: Model, as_json: JsonFlag = False) -> None:
    """Structure, bytes by part and what can be done, from configuration and headers alone."""
    from trimoe import inspection

    about = inspection.inspect(model)
    print(json.dumps(about, indent=1) if as_json else inspection.table(about))


@app.command()
def plan(
    model: Model, recipe: RecipeName, changes: Changes = [], samples: Samples = None, length: Length = None, as_json: JsonFlag = False
) -> None:
    """Sizes before and after, and what will load the result. Reads no weight."""
    import trimoe

    made = trimoe.plan(model, recipe, changes, samples=samples, length=length)
    print(json.dumps(made.to_json(), indent=1) if as_json else made)


@app.command()
def stats(
    model: Model, out: Annotated[Path, typer.Option(help="the statistics file to write")], calibration: Texts = [], samples: Samples = None,
    length: Length = None, seed: Seed = 0, device: Device = "cpu", dtype: Dtype = "float32", quiet: Quiet = False,
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
        reporter=_reporter(quiet),
    )
    print(f"Wrote {out}: statistics of {len(made.layers)} MoE layers.")


@app.command()
def compress(
    model: Model, recipe: RecipeName, out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    changes: Changes = [], calibration: Texts = [], samples: Samples = None, length: Length = None, seed: Seed = 0,
    stats: Annotated[Path | None, typer.Option(help="a file written by trimoe stats")] = None, device: Device = "cpu",
    dtype: Dtype = "float32", json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Compress a model into a new folder. Killed and run again with the same arguments, it resumes."""
    import trimoe

    _writable(json_file)

    result = trimoe.compress(
        model, recipe, out, changes=changes, calibration=calibration, samples=samples, length=length, seed=seed, stats=stats,
        device=device, dtype=dtype, command=_command(), reporter=_reporter(quiet),
    )  # fmt: skip
    print(result.plan)
    _write_json(json_file, {"out": str(result.out), "plan": result.plan.to_json(), "metrics": result.metrics})


@app.command()
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
    seed: Seed = 0, device: Device = "cpu", json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a compressed model to win back quality. Killed and run again with the same arguments, it resumes."""
    import trimoe
    from trimoe import recipe

    _writable(json_file)
    given = {"data": list(data) or None, "samples": samples, "length": length, "epochs": epochs, "steps": steps, "adapter": adapter or None}
    body = {"method": method, **{key: value for key, value in given.items() if value is not None}}
    made = trimoe.recover(
        folder,
        out,
        recipe.recovery(body, changes),
        teacher=teacher,
        seed=seed,
        device=device,
        command=_command(),
        reporter=_reporter(quiet),
    )
    for name, before in made.metrics["before"].items():
        print(f"{name.replace('_', ' ')} on held-out text: {before:.4g} -> {made.metrics['after'][name]:.4g}")
    _write_json(json_file, {"out": str(made.out), "metrics": made.metrics})


@app.command(name="eval")
def evaluate(
    folder: Model,
    against: Annotated[str | None, typer.Option(help="the model to compare with; a trimoe folder's origin is taken by default")] = None,
    text: Annotated[list[str], typer.Option(help="text or jsonl file, name=path, datasets id, builtin:mixed; repeatable")] = [],
    length: Annotated[int, typer.Option(help="window, in tokens (cut to the model's context)")] = 2048,
    stride: Annotated[int | None, typer.Option(help="how far windows advance; half the window by default")] = None,
    tokens: Annotated[int, typer.Option(help="scored tokens of each text, at most about")] = 32768,
    device: Device = "cpu", dtype: Dtype = "float32", json_file: JsonFile = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Perplexity on each text; KL and agreement against the original. Both models are streamed."""
    import trimoe
    from trimoe import UserError, card, distributed, tables
    from trimoe.evaluate import origin
    from trimoe.stream import compute_dtype

    _writable(json_file)
    reporter = _reporter(quiet)
    made_from = card.made_from(Path(folder))
    if against is None and made_from is not None:
        try:
            against = origin(Path(folder))
        except UserError as reason:
            reporter.say(f"It is evaluated alone, not against the model it was made from: {reason}")
    report = trimoe.evaluate(
        folder, against=against, text=text or ["builtin:mixed"], length=length, stride=stride, tokens=tokens, device=device,
        dtype=compute_dtype(dtype), reporter=reporter,
    )  # fmt: skip
    tables.evaluation(report)
    if (
        distributed.speaks()
        and made_from is not None
        and against is not None
        and (against == made_from or Path(against).resolve() == Path(made_from))
    ):
        card.add_evaluation(Path(folder), report)
    _write_json(json_file, report)


@app.command()
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
    """Tokens per second, time to the first token and memory, here; against another model in turns."""
    import trimoe
    from trimoe import tables

    _writable(json_file)
    report = trimoe.bench(
        folder, against, prompt=prompt, generate=generate, batch=batch, rounds=rounds, device=device, dtype=dtype, backend=backend,
        reporter=_reporter(quiet),
    )  # fmt: skip
    tables.bench(report)
    _write_json(json_file, report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")] = Path("demo-mini-mixtral"),
    model: Annotated[str, typer.Option(help="which built-in model")] = "builtin:mini-mixtral", quiet: Quiet = False,
) -> None:  # fmt: skip
    """The main job on a built-in model: MoE-I2, evaluated before and after on held-out text."""
    import trimoe
    from trimoe import card, distributed, tables

    reporter = _reporter(quiet)
    result = trimoe.compress(model, "moe-i2", out, command=_command(), reporter=reporter)
    report = trimoe.evaluate(out, against=model, reporter=reporter)
    if distributed.speaks():
        card.add_evaluation(out, report)
    print(result.plan)
    tables.evaluation(report)
    print(f"The compressed model lies in {out.resolve()}; load it with: import trimoe; model = trimoe.load({str(out)!r})")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="print this one", show_default=False)] = None) -> None:
    """The built-in recipes; with a name, one of them as YAML ready to edit."""
    from trimoe import recipe

    if name is not None:
        print(recipe.text_of(name), end="")
        return
    for known in recipe.names():
        print(f"{known:<20} {recipe.text_of(known).splitlines()[0].lstrip('# ')}")


def _writable(path: Path | None) -> None:
    """Find out before hours of work, not after."""
    from trimoe.errors import UserError

    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise UserError(f"--json {path} cannot be written: give a file in a folder that exists.")


def _write_json(path: Path | None, value: dict[str, Any]) -> None:
    from trimoe import distributed

    if path is not None and distributed.speaks():
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Entry point: turns a user's mistake into one sentence on standard error and exit code 2."""
    from transformers.utils import logging

    from trimoe import distributed
    from trimoe.errors import UserError

    logging.set_verbosity_error()  # this process is ours: warnings about configurations are not the user's business here
    if not distributed.speaks():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)
    try:
        app()
    except UserError as mistake:
        if not isinstance(mistake, distributed.Elsewhere):
            print(f"trimoe: {mistake}", file=sys.stderr)
        sys.exit(2)
    except OSError as failure:
        print(f"trimoe: {failure}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
