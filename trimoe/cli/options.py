"""What several verbs share: their options, progress, and results as JSON files."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="a folder, a hub id, or builtin:NAME", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="a built-in recipe (see trimoe recipes) or a YAML file")]
Changes = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a recipe field, e.g. steps.0.ratio=0.5")]
Texts = Annotated[
    list[str],
    typer.Option(
        "--calibration",
        "-c",
        help="file, name=path, data set (NAME:CONFIG/SPLIT#COLUMN), builtin:mixed; repeatable",
    ),
]
Samples = Annotated[int | None, typer.Option(help="calibration samples")]
Length = Annotated[int | None, typer.Option(help="tokens in a sample (cut to the model's context)")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[
    str, typer.Option(help="precision the layers run in: float32, bfloat16, float16; auto: bfloat16 on a GPU that has it, else float32")
]
AnyMemory = Annotated[bool, typer.Option("--any-memory", help="begin even where it takes more memory than this machine has")]
JsonFlag = Annotated[bool, typer.Option("--json", help="JSON on standard output")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the result as JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def names_of(tasks: str) -> list[str]:
    """Of `--tasks A,B`."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


def reporter_of(quiet: bool) -> Any:
    from trimoe.progress import Reporter

    return Reporter("quiet" if quiet else "auto")


def command_line() -> str:
    return shlex.join(["trimoe", *sys.argv[1:]])


OWN = frozenset({  # files that transformers, peft or trimoe read in a model's folder
    "adapter_config.json", "added_tokens.json", "chat_template.json", "config.json", "generation_config.json", "model.safetensors.index.json",
    "preprocessor_config.json", "processor_config.json", "quantization_config.json", "special_tokens_map.json", "trimoe.json", "vocab.json",
})  # fmt: skip
STAMP = "trimoe"  # the first key of every result, with the version that wrote it


def check_writable(path: Path | None, out: Path | None = None) -> None:
    """Find out before hours of work, not after; and replace nothing but an earlier result, or an empty file. `out`: what else is made."""
    from trimoe.checkpoint import free_disk
    from trimoe.checkpoint.atomic import refuse_odd
    from trimoe.errors import UserError

    if path is None:
        return
    refuse_odd(path, "--json")
    if out is not None:
        refuse_odd(out)
        if path.resolve() == out.resolve():
            raise UserError(f"--json {path} is the folder that --out makes; give a file outside it.")
    if (path.exists() and not path.is_file()) or not path.resolve().parent.is_dir():
        raise UserError(f"--json {path} cannot be written: give a file in a folder that exists.")
    own = path.name in OWN or path.name.startswith("tokenizer") or (path.suffix != ".json" and path.exists())
    if own and (path.resolve().parent / "config.json").is_file():
        raise UserError(f"--json {path} is the name of a file of a model's folder; give another name.")
    if path.exists() and path.stat().st_size and not _is_result(path):
        raise UserError(f"--json {path} exists and is no earlier result of trimoe's, so it is not replaced; give another name.")
    free_disk.probe(path, "--json")


def _is_result(path: Path) -> bool:
    """Whether write_json wrote it."""
    from trimoe.checkpoint.side_files import RECORD

    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return path.name != RECORD and isinstance(held, dict) and next(iter(held), None) == STAMP
    except (ValueError, RecursionError, OSError):
        return False


def write_json(path: Path | None, value: dict[str, Any]) -> None:
    """Whole or not at all."""
    from trimoe import team
    from trimoe.checkpoint.atomic import write_text
    from trimoe.version import VERSION

    if path is not None and team.speaks():
        write_text(path, json.dumps({STAMP: VERSION, **value}, indent=1) + "\n")


def print_plan(made: Any) -> None:
    """A plan on standard output."""
    from trimoe.show import plan, table

    table.show(plan.of_plan(made.to_json()))
