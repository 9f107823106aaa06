"""What a page is made of: sections of figures and tables. Plain values; nothing here knows HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimoe.show.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart and the table that says the same. `name` is its file's under --figures (lower case, hyphens), unique on the page; `wide`: the
    least width in pixels at which it can be read, narrower screens scroll it; `dense`: so many marks that it is painted on a canvas."""

    name: str
    title: str
    chart: Any
    table: Table
    note: str = ""
    wide: int = 0
    dense: bool = False


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text to be copied: a command, a recipe."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number that matters."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence or two, and what they are about. `name` is its anchor, unique on the page."""

    name: str
    title: str
    text: str = ""
    warnings: Sequence[str] = ()
    tiles: Sequence[Tile] = ()
    blocks: Sequence[Figure | Table | Code] = ()
