"""The report, top to bottom: one folder in full, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimoe.checkpoint import free_disk
from trimoe.checkpoint.atomic import refuse_odd, write_text
from trimoe.errors import UserError, reading
from trimoe.output.record import Record
from trimoe.progress import QUIET, Reporter
from trimoe.report import charts, chosen, measured, size
from trimoe.report.measured import interval
from trimoe.report.page import charts_page, check_figures, is_ours, write_figures
from trimoe.report.section import Code, Figure, Section
from trimoe.show.frontier import of_mean_kl
from trimoe.show.table import Table


def report(
    folders: Sequence[str | Path], html: Path | None = None, figures: Path | None = None, reporter: Reporter = QUIET
) -> list[Path]:  # fmt: skip
    """Write the page `html` on finished folders (one in full, several against each other) and, into the folder `figures`, its charts as SVG
    and PNG. Returns the files, the page first. Raises UserError for folders that are not finished or whose record
    does not make sense, and where `html` or `figures` cannot be written or is a file that is no page of trimoe's."""
    opened = [Record.finished(Path(folder)) for folder in folders]
    if html is not None:
        _check_page(html)
    with reporter.stage("Draw the page"), reading(Path(", ".join(str(one.path) for one in opened))):
        made = full(opened[0]) if len(opened) == 1 else compared(opened)
        page = charts_page(title_of(opened), made, subtitle=subtitle_of(opened)) if html is not None else ""
    if figures is not None:
        check_figures(figures, made)
        if html is not None and figures.resolve() == html.resolve():
            raise UserError(f"The page and the folder of figures are both to be {html}; give two names.")
    files = []
    if html is not None:
        write_text(html, page)
        files.append(html)
    return files + (write_figures(figures, made, reporter) if figures is not None else [])


def _check_page(html: Path) -> None:
    """Found out before it is drawn; and nothing but an earlier page of trimoe's is replaced."""
    refuse_odd(html, "The page")
    if (html.exists() and not html.is_file()) or not html.resolve().parent.is_dir():
        raise UserError(f"The page {html} cannot be written: give a file in a folder that exists.")
    if html.suffix != ".html":
        raise UserError(f"{html} is no name of a page; give one that ends in .html.")
    if html.exists() and not is_ours(html):
        raise UserError(f"{html} is there already and is no page that trimoe wrote, so it is not replaced; give another name.")
    free_disk.probe(html, "The page")


def title_of(folders: Sequence[Record]) -> str:
    if len(folders) > 1:
        return f"{len(folders)} compressed models compared"
    return f"{Path(folders[0].model).name or folders[0].model}, compressed"


def subtitle_of(folders: Sequence[Record]) -> str:
    if len(folders) > 1:
        return ", ".join(folder.name for folder in folders)
    return f"{folders[0].folder}: {folders[0].method} on {folders[0].model}"


def full(folder: Record) -> list[Section]:
    """Everything there is to say of one folder; sections without data are left out."""
    said = [folder.plan.get("warnings") or (), *(step.metrics.get("warnings") or () for step in folder.steps)]
    warnings = [str(warning) for warnings in said for warning in warnings]
    first = Section(name="summary", title="Summary", tiles=size.tiles(folder), warnings=warnings)
    speed = size.speed(folder)
    chosen_by = chosen.sections(folder)
    return [
        first, *measured.sections(folder), *([speed] if speed else []), size.size(folder), *chosen_by, size.origin(folder),
    ]  # fmt: skip


def compared(folders: Sequence[Record]) -> list[Section]:
    """Size against quality of several."""
    names = unique([folder.name for folder in folders])
    points = [point for folder, name in zip(folders, names, strict=True) if (point := point_of(folder, name)) is not None]
    rows = [
        (name, folder.method, f"{folder.after['file_bytes']:,}", f"{folder.share:.1%}",
         f"{folder.kl:.4f}" if folder.kl is not None else "not evaluated", folder.model)
        for folder, name in zip(folders, names, strict=True)
    ]  # fmt: skip
    table = Table(caption="Results", head=("result", "steps", "bytes", "share", "KL, nats/token", "model"), rows=rows)
    models = {folder.model for folder in folders}
    asked = [{folder.asked for folder in folders if folder.model == model and folder.kl is not None} for model in models]
    alike = all(len(ways) <= 1 for ways in asked)
    blocks: list[Any] = []
    if points:
        note = "Down and to the left is better."
        note += (
            " The dashed line joins the results that no other beats in both."
            if alike
            else " No line joins them: they were not evaluated alike."
        )
        blocks.append(Figure(name="frontier", title="Size against KL", chart=charts.frontier(points, alike=alike), table=table, note=note))
    else:
        blocks.append(table)
    text = "KL to the original on held-out text (the mean over the texts), by the share of the original's bytes."
    if len(models) > 1:
        text += f" These were made from {len(models)} different models: compare within a model."
    if not alike:
        text += (
            " Results of one model were NOT evaluated alike (texts, tokens, windows or stride differ): their KLs cannot be compared; "
            "run trimoe eval alike on each."
        )
    missing = [name for folder, name in zip(folders, names, strict=True) if folder.kl is None]
    if missing:
        text += f" Not evaluated against the original yet (trimoe eval DIR): {', '.join(missing)}."
    made = [Section(name="compared", title="Size and quality", text=text, blocks=blocks)]
    kl = _by_text(folders, names)
    if kl:
        made.append(Section(name="texts", title="By text", blocks=kl))
    commands = [Code(title=name, text="\n".join(folder.commands)) for folder, name in zip(folders, names, strict=True)]
    made.append(Section(name="commands", title="Commands", text="trimoe report DIR shows one of them in full.", blocks=commands))
    return made


def unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where several are the same."""
    return [name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)]


def point_of(folder: Record, name: str) -> dict[str, Any] | None:
    """A point of the frontier; None where the folder was not evaluated."""
    if folder.kl is None:
        return None
    low, high = of_mean_kl(folder.texts)
    return {
        "name": name, "method": folder.method, "bytes": folder.after["file_bytes"], "share": folder.share, "kl": folder.kl, "kl_low": low, "kl_high": high,
    }  # fmt: skip


def _by_text(folders: Sequence[Record], names: Sequence[str]) -> list[Figure]:
    rows = []
    for folder, name in zip(folders, names, strict=True):
        for row in folder.texts:
            if row.get("against"):
                low, high = interval(row, "kl")
                rows.append({"text": row["name"], "result": name, "kl": row["kl"], "low": low, "high": high,
                             "perplexity": row["perplexity"], "before": row["against"]["perplexity"]})  # fmt: skip
    if not rows:
        return []
    return [
        Figure(
            name="kl-by-text", title="KL by text",
            chart=charts.dots(rows, y="text", x="kl", x_title="KL, nats/token", series="result", form=".4f"),
            table=Table(
                caption="KL by text", head=("result", "text", "KL (95 %)", "perplexity", "of the original"),
                rows=[(row["result"], row["text"], measured.ranged(f"{row['kl']:.4f}", row["low"], row["high"], ".4f"),
                       f"{row['perplexity']:.3f}", f"{row['before']:.3f}") for row in rows],
            ),
        )
    ]  # fmt: skip
