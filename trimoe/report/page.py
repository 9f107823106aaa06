"""Sections to one HTML page that needs nothing else, and to figure files.

Nothing that a record says reaches the page unescaped (Jinja2's autoescape; charts as JSON without a `<`), its own scripts are named by
their hashes, and its policy forbids every other script and all network, so that a page made from a stranger's folder is safe to open.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from trimoe.checkpoint import free_disk
from trimoe.checkpoint.atomic import refuse_odd, write_text
from trimoe.errors import UserError
from trimoe.progress import QUIET, Reporter
from trimoe.report import theme
from trimoe.report.section import Figure, Section
from trimoe.version import VERSION

try:
    import jinja2
    import vl_convert
    from markupsafe import Markup
except ImportError:
    raise UserError("A page needs jinja2 and vl-convert-python; pip install 'trimoe[report]'.") from None

VEGA_LITE = "6.4"  # of the bundle in the page, and what figures are drawn with
GENERATOR, HEAD = b'<meta name="generator" content="trimoe ', 4096  # every page says so in its first bytes
VEGA = b'class="marks"'  # every SVG that Vega draws says so in its first bytes
POLICY = "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"  # no connect-src


def charts_page(title: str, sections: Sequence[Section], *, subtitle: str = "", footer: str = "") -> str:
    """The page as HTML: headings, tiles, charts with tables as their text alternative, light and dark."""
    names = [section.name for section in sections] + [figure.name for figure in figures(sections)]
    if len(set(names)) != len(names):  # they are anchors
        raise ValueError(f"two figures are called {next(name for name in names if names.count(name) > 1)}")
    drawn = {figure.name: _spec(figure, width="container") for figure in figures(sections)}
    specs = json.dumps(
        {"specs": drawn, "themes": {"light": theme.LIGHT, "dark": theme.DARK}, "entry": theme.ENTRY}, separators=(",", ":"), allow_nan=False
    )
    bundle, script = (_bundle() if drawn else ""), _file("page.js")
    policy = POLICY.format(" ".join(f"'sha256-{_hash(text)}'" for text in (bundle, script)))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_file("page.html.j2"))
    return template.render(
        title=title, subtitle=subtitle, sections=sections, footer=footer or f"Made by trimoe {VERSION}.", version=VERSION,
        policy=Markup(policy), style=Markup(_file("page.css")), bundle=Markup(bundle), script=Markup(script),
        specs=Markup(specs.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
    )  # fmt: skip


def is_ours(path: Path) -> bool:
    """Whether a file is a page that `charts_page` made, as its head says."""
    with open(path, "rb") as file:
        return GENERATOR in file.read(HEAD)


def check_figures(folder: Path, sections: Sequence[Section]) -> None:
    """Raises UserError where the folder cannot be made, or a chart would replace a picture that is none of ours (an SVG that Vega did not
    draw, a PNG without its SVG)."""
    refuse_odd(folder, "The folder of figures")
    if (folder.exists() and not folder.is_dir()) or not folder.resolve().parent.is_dir():
        raise UserError(f"The figures cannot be written to {folder}: give a folder, in one that exists.")
    for figure in figures(sections):
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        if (svg.exists() and VEGA not in svg.read_bytes()[:HEAD]) or (png.exists() and not svg.exists()):
            raise UserError(
                f"{svg if svg.exists() else png} is there already and was not drawn by trimoe, so it is not replaced; give another folder."
            )
    free_disk.probe(folder / "x", "The figures")


def write_figures(folder: Path, sections: Sequence[Section], reporter: Reporter = QUIET) -> list[Path]:
    """Every chart as FOLDER/name.svg and name.png (light, twice the size). Returns the files."""
    folder.mkdir(exist_ok=True)
    files, drawn = [], list(figures(sections))
    for figure in reporter.track(drawn, "Draw the figures", len(drawn)):
        spec = {**_spec(figure), "background": "white"}
        options: dict[str, Any] = {"vl_version": VEGA_LITE, "config": theme.LIGHT, "allowed_base_urls": []}
        svg, png = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        write_text(svg, vl_convert.vegalite_to_svg(spec, **options))
        png.write_bytes(vl_convert.vegalite_to_png(spec, scale=2, **options))
        files += [svg, png]
    return files


def figures(sections: Sequence[Section]) -> Iterator[Figure]:
    for section in sections:
        yield from (block for block in section.blocks if isinstance(block, Figure))


def _spec(figure: Figure, **changes: Any) -> dict[str, Any]:
    """Vega-Lite as JSON, without Altair's own look and the schema's address."""
    made = figure.chart.properties(description=f"{figure.title}. {figure.note}".strip(), **changes).to_dict()
    return {key: value for key, value in made.items() if key not in ("$schema", "config")}


@functools.cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, for inside a script element."""
    return (
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
        .replace("</script", "<\\/script")
        .replace("<!--", "<\\!--")
        .strip()
    )


@functools.cache
def _file(name: str) -> str:
    return resources.files("trimoe.report").joinpath(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
