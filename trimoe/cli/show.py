"""Verbs that show a result to others: the report, and the way to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimoe.cli.options import Quiet, reporter_of


def report(
    folders: Annotated[list[str], typer.Argument(help="finished folders: one in full, several against each other", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="the page to write; DIR/report.html by default")] = None,
    figures: Annotated[Path | None, typer.Option(help="also write every chart as SVG and PNG into this folder")] = None,
    quiet: Quiet = False,
) -> None:
    """One self-contained page of everything that is known of a result; refreshes its model card."""
    from trimoe.checkpoint.whole import PAGE
    from trimoe.errors import UserError
    from trimoe.output import card
    from trimoe.output.record import Record
    from trimoe.report.build import report as build

    opened = [Record.finished(Path(folder)) for folder in folders]
    if html is None:
        if len(folders) > 1:
            raise UserError("Several folders are compared on a page of their own; say where to write it: --html FILE.")
        html = opened[0].folder / PAGE
    for finished in opened:
        card.check(Record.read(finished.folder))
    written = build(folders, html, figures, reporter_of(quiet))
    for finished in opened:
        card.refresh(Record.read(finished.folder))
    print(f"The report lies in {written[0].resolve()}.")
    if figures is not None:
        print(f"{len(written) - 1} figures lie in {figures.resolve()}.")


def push(
    folder: Annotated[Path, typer.Argument(help="a finished folder", show_default=False)],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the hub", show_default=False)],
    private: Annotated[bool, typer.Option("--private/--public", help="whether a repository that is made now is private")] = True,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    revision: Annotated[str | None, typer.Option(help="the branch; made if it is not there")] = None,
) -> None:
    """Upload a finished folder to the Hugging Face hub."""
    from trimoe.report.push import push as upload

    print(f"Uploaded to {upload(folder, repo, private=private, message=message, revision=revision)}")
