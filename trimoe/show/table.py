"""Tables: one value, which a terminal, Markdown and the macro of a page (report/page.html.j2) show."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

LONG = 6000  # letters in a table


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are text as it is shown. The columns `words` hold words, which stand on the left and may wrap; the others numbers, which stand
    on the right and stay whole. Above the rows `parted` a terminal draws a line."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: Collection[int] = (0,)
    title: str = ""
    caption: str = ""
    parted: Collection[int] = ()

    @property
    def prose(self) -> bool:
        return len(self.words) == len(self.head)

    @property
    def long(self) -> bool:
        """Whether a page folds it away until it is asked for."""
        return sum(len(cell) for row in self.rows for cell in row) > LONG

    def without(self, *names: str) -> Table:
        """Return it without the columns that have these heads."""
        kept = [number for number, name in enumerate(self.head) if name not in names]
        words = [new for new, number in enumerate(kept) if number in self.words]
        return replace(self, head=_of(self.head, kept), rows=[_of(row, kept) for row in self.rows], words=words)


def _of(cells: Sequence[Any], kept: Sequence[int]) -> list[Any]:
    return [cells[number] for number in kept]


# ---- Markdown


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- a terminal


@dataclass(frozen=True)
class Fitting:
    """The first of several tables, the widest first, that there is room for (with `wraps`, once its words are wrapped), else the last, on a
    terminal. `gap`: spaces between columns, 2 or 3. With `fold` headings break anywhere (long names), else between words alone."""

    tables: Sequence[Table]
    wraps: bool = False
    gap: int = 3
    fold: bool = False

    def __rich_console__(self, shown: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width
        for table in self.tables:
            made, numbers = self._grid(table), self._numbers(table)
            widest = Measurement.get(shown, options.update(width=1000, max_width=1000), made).maximum
            if (self._least(table) if self.wraps else widest) <= room:
                break
        if widest > room:  # no column of numbers is wider than it must be
            for number, width in numbers.items():
                made.columns[number].width = width
        yield made

    def _grid(self, table: Table) -> Grid:
        made = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, self.gap - 2, 0, 1), show_edge=False)
        made.title, made.caption = table.title or None, table.caption or None
        for number, name in enumerate(table.head):
            justify: Any = "left" if number in table.words else "right"
            made.add_column(Text(name), justify=justify, overflow="fold", min_width=self._heading(name) or None)
        for number, row in enumerate(table.rows):
            if number in table.parted:
                made.add_section()
            made.add_row(*row)
        return made

    def _heading(self, name: str) -> int:
        return 0 if self.fold else _longest([name])

    def _numbers(self, table: Table) -> dict[int, int]:
        """Return the least width of each column of numbers."""
        lines = {number: [line for row in table.rows for line in str(row[number]).splitlines()] for number in range(len(table.head))}
        return {
            number: max([self._heading(name), *map(len, lines[number])])
            for number, name in enumerate(table.head) if number not in table.words
        }  # fmt: skip

    def _least(self, table: Table) -> int:
        """Return the characters of a line below which a word or number breaks."""
        words = sum(_longest([table.head[number], *(row[number] for row in table.rows)]) for number in table.words)
        return words + sum(self._numbers(table).values()) + self.gap * (len(table.head) - 1)


def _longest(cells: Iterable[Any]) -> int:
    return max((len(word) for cell in cells for word in str(cell).split()), default=0)


def rendered(shown: RenderableType) -> str:
    """Return it without colours, 80 columns wide."""
    file = io.StringIO()
    console(file, width=80).print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def console(file: Any = None, width: int | None = None) -> Console:
    """Text is printed as it is: names from outside are no markup."""
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False, color_system=None if file else "auto")


def show(shown: RenderableType) -> None:
    """On standard output: in colours and in its width on a terminal, plain and 80 columns wide elsewhere."""
    terminal = console()
    if terminal.is_terminal:
        terminal.print(shown)
    else:
        print(rendered(shown))
