"""Plans and structure as tables: on a terminal in its width and with colours, elsewhere plain in 80 columns."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from trimoe.show.answer import Answer
from trimoe.show.form import form_of
from trimoe.show.format import COUNTS, GONE, PER, bounds, human, runs, short

CACHE = f"cache/{PER // 1000}K"


def plain(plan: dict[str, Any]) -> str:
    """`plan` (its JSON) without colours, 80 columns wide."""
    return rendered(of_plan(plan))


def rendered(shown: RenderableType) -> str:
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


def of_plan(plan: dict[str, Any]) -> RenderableType:
    """Everything that a plan says; under "passes" it may have passes.py's rows, under "traffic" what statistics say of routing."""
    head = Text.assemble((plan["model"], "bold"), f" -> {form_of(plan)} checkpoint")
    parts = [head, _totals(plan), _layers(plan), *_engines(plan), *_measured(plan), _resources(plan)]
    parts += [part for name, show in (("passes", _passes), ("traffic", _traffic)) if plan.get(name) for part in show(plan[name])]
    return _apart(*parts, *(Text.assemble(("warning: ", "bold yellow"), warning) for warning in plan["warnings"]))


def _apart(*parts: RenderableType) -> Group:
    """With an empty line between tables."""
    return Group(*(piece for part in parts for piece in ((Text(""), part) if isinstance(part, Table | Fitting) else (part,))))


def table(*columns: str, left: int = 1, left_out: Collection[str] = (), fold: bool = False, gap: int = 3) -> Whole:
    """An open table; the first `left` columns are words, the others numbers, which stay whole. Headings break between words alone (with
    `fold` anywhere: long names). Columns that are `left_out` stay out of every row, too. `gap`: spaces between columns, 2 or 3."""
    made = Whole([name not in left_out for name in columns], gap)
    for number, name in enumerate(columns):
        if name not in left_out:
            least = None if fold else _longest([name]) or None
            made.add_column(Text(name), justify="left" if number < left else "right", overflow="fold", min_width=least)
            made.left += number < left
    return made


def fitting(make: Callable[[Collection[str]], Whole], *without: Collection[str], wraps: bool = False) -> Fitting:
    """make(columns to be left out), with as few left out as there is room for: none, or those of the first in `without` that fits."""
    return Fitting(tuple(partial(make, left_out) for left_out in ((), *without)), wraps)


class Whole(Table):
    """The first `left` columns are words. Where there is little room, headings wrap, then words; numbers never do. `shown`: which cells of
    a row are columns of it."""

    def __init__(self, shown: list[bool], gap: int):
        super().__init__(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 2, 0, 1), show_edge=False)
        self.shown, self.left, self.gap = shown, 0, gap

    def add(self, *cells: str) -> None:
        """A row, columns that are left out included."""
        self.add_row(*(cell for cell, there in zip(cells, self.shown, strict=True) if there))

    def __rich_console__(self, shown: Console, options: ConsoleOptions) -> RenderResult:
        if _widest(shown, options, self) > options.max_width:
            self.squeeze()
        yield from super().__rich_console__(shown, options)

    def squeeze(self) -> None:
        """No column of numbers is wider than it must be."""
        for column, width in zip(self.columns[self.left :], self._numbers(), strict=True):
            column.width = width

    def least(self) -> int:
        """Characters of a line below which a word or number breaks."""
        words = [_longest([column.header, *column._cells]) for column in self.columns[: self.left]]
        return sum(words) + sum(self._numbers()) + self.gap * (len(self.columns) - 1)

    def _numbers(self) -> list[int]:
        columns = [(column.min_width or 0, column._cells) for column in self.columns[self.left :]]
        return [max([least, *(len(line) for cell in cells for line in str(cell).splitlines())]) for least, cells in columns]


def _longest(cells: Iterable[Any]) -> int:
    return max((len(word) for cell in cells for word in str(cell).split()), default=0)


def _widest(shown: Console, options: ConsoleOptions, made: Table) -> int:
    """How wide a table is with all the room there could be."""
    return Measurement.get(shown, options.update(width=1000, max_width=1000), made).maximum


@dataclass(frozen=True)
class Fitting:
    """The first of several tables, the widest first, that there is room for (with `wraps`, once its words are wrapped); else the last."""

    tables: tuple[Callable[[], Whole], ...]
    wraps: bool = False

    def __rich_console__(self, shown: Console, options: ConsoleOptions) -> RenderResult:
        for make in self.tables[:-1]:
            made = make()
            if (made.least() if self.wraps else _widest(shown, options, made)) <= options.max_width:
                yield made
                return
        yield self.tables[-1]()


def _totals(plan: dict[str, Any]) -> Fitting:
    """Where there is little room, without the shares, or with what comes out alone."""
    rows = list(_total_rows(plan))

    def made(left_out: Collection[str]) -> Whole:
        shown = table("", "before", "after", "share", left_out=left_out)
        for row in rows:
            shown.add(*row)
        return shown

    return fitting(made, ["share"], ["before", "share"], wraps=True)


def _total_rows(plan: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    before, after = plan["before"], plan["after"]
    exact, known = after["file_bytes"] == after["least_bytes"], all(row["kept"] is not None for row in plan["layers"])
    for name, label in (("layers", "decoder layers"), ("moe_layers", "MoE layers")):
        was, low, high = plan["depth"][name]
        if was != low:
            yield label, f"{was}", f"{bounds(low, high)} of {was}", f"{high / was:.1%}"
    size = bounds(after["least_bytes"], after["file_bytes"])
    yield "bytes of the files", f"{before['file_bytes']:,}", size, f"{after['file_bytes'] / before['file_bytes']:.1%}"
    sign = "" if exact or known else "at most "
    for label, key in (("parameters", "parameters"), ("  active per token", "active"), ("  in routed experts", "experts")):
        how = "about " if sign and key == "active" else sign  # a stand-in's: which experts a token meets is open
        yield label, f"{before[key]:,}", f"{how}{after[key]:,}", _share(before[key], after[key])
    flops, about = f"FLOPs per token at {plan['context']:,}", "about " if sign else ""
    yield flops, short(before["flops"]), about + short(after["flops"]), _share(before["flops"], after["flops"])
    cache, key = f"cache of {PER:,} tokens", "cache_bytes"
    if before[key] is None:
        yield cache, "not known", "not known", ""
        return
    yield cache, human(before[key]), human(after[key]), _share(before[key], after[key])
    if before["state_bytes"]:
        yield "  of fixed size", human(before["state_bytes"]), human(after["state_bytes"]), ""


def _share(before: float, after: float) -> str:
    return f"{after / before:z.1%}" if before else ""


def _layers(plan: dict[str, Any]) -> Fitting:
    """A line for every run of layers that are alike; where there is little room, without what the totals say as well."""
    last = ["params", "active", "FLOPs", CACHE]
    return fitting(partial(_by_layer, plan), *(last[place:] for place in (3, 2, 1, 0)))


def _by_layer(plan: dict[str, Any], left_out: Collection[str]) -> Whole:
    """Without some of the columns."""
    made = table("layer", "experts", "form", "tensor bytes", "params", "active", "FLOPs", CACHE, left=3, left_out=left_out)

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        after = row["after"]
        cached = after["cache"]
        return (
            f"{row['experts']} -> {_left(row)}" if row["experts"] else "dense", _form(row), human(after["bytes"]),
            short(after["parameters"], COUNTS), short(after["active"], COUNTS), short(after["flops"]), "?" if cached is None else human(cached["bytes"]),
        )  # fmt: skip

    for same, run in groupby(plan["layers"], cells):
        numbers = [row["layer"] for row in run]
        made.add(runs(numbers), *same)
    open_ = any(row["kept"] is None for row in plan["layers"])
    if open_ and any(name in ("layer_drop", "block_drop") for step in plan["recipe"]["steps"] for name in step):
        made.caption = "each layer as it is if it stays: which ones go is decided on the calibration text"
    rest = plan["dense_layers"]
    if rest["count"]:
        parameters, flops = short(rest["parameters"][1], COUNTS), short(rest["flops"][1])
        made.add("others", f"{rest['count']} dense", "", human(rest["bytes"][1]), parameters, "", flops, "")
    return made


def _left(row: dict[str, Any]) -> str:
    """How many experts a layer keeps, if it stays."""
    known = row["if_it_stays"] if row["kept"] is None else row["kept"]
    return "?" if known is None else f"{known}"


def _form(row: dict[str, Any]) -> str:
    if row["gone"]:
        return GONE[row["gone"]]
    words = [f"rank {row['rank']}"] if row["rank"] is not None else []
    words += [f"{row['bits']} bits"] if row["bits"] else []
    zeros = row["sparsity"]
    words += [f"{zeros if isinstance(zeros, str) else format(zeros, '.0%')} zeros"] if zeros is not None else []
    return ", ".join(words)


def _engines(plan: dict[str, Any]) -> Iterable[RenderableType]:
    made = table("loads in", "", left=2)
    for engine, words in plan["loads_in"].items():
        made.add_row(engine, Text(words, {"yes": "green", "no": "red"}.get(Answer.from_json(words).loads, "yellow")))
    yield made


def _measured(plan: dict[str, Any]) -> Iterator[Table]:
    """On how much text what is still open will be decided."""
    rows = plan.get("measured_on") or ()
    if not rows:
        return
    made, steps = table("decided on", "tokens", "", left=1), {row["step"] for row in rows}
    made.columns[2].justify = "left"
    for row in rows:
        words = f"{row['samples']:,} samples, {row['versions']} versions of the model" if "samples" in row else ""
        if "routed" in row:
            words = f"{row['routed']:,} an expert, on average" + (
                f"; {row['wanted']:,} do not fit" if row["tokens"] < row["wanted"] else ""
            )
        made.add_row(row["name"] + (f", step {row['step'] + 1}" if len(steps) > 1 else ""), f"{row['tokens']:,}", words)
    yield made


def _resources(plan: dict[str, Any]) -> Table:
    made = table("to make it here", "", left=2)
    for label, stages in (("memory, at most about", plan["memory_split"]), ("memory of the device", plan.get("device_split"))):
        if stages:
            by_stage = "; ".join(f"{name}: {human(size)}" for name, size in stages.items())
            made.add_row(label, human(max(stages.values())) + (f" ({by_stage})" if len(stages) > 1 else ""))
    split = plan["disk_split"]
    beside = "" if len(split) == 1 else " (" + "; ".join(f"{name}: {human(size)}" for name, size in split.items()) + ")"
    made.add_row("disk", human(plan["disk"]) + beside)
    if plan["spill"]:
        made.add_row("disk for TMPDIR", human(plan["spill"]))
    return made


def _passes(rows: list[dict[str, Any]]) -> Iterable[RenderableType]:
    """How often each stage goes through the model; where there is little room, without the versions that walk side by side."""

    def made(left_out: Collection[str]) -> Whole:
        shown = table("passes over the model", "times", "tokens", "versions", "read", "written", left_out=left_out)
        for row in rows:
            sizes = ["" if row[name] is None else human(row[name]) for name in ("read_bytes", "written_bytes")]
            shown.add(row["stage"], str(row["passes"]), f"{row['tokens']:,}", str(row["versions"]), *sizes)
        return shown

    yield fitting(made, ["versions"], ["times", "versions"], ["times", "tokens", "versions"])


def _traffic(traffic: dict[str, Any]) -> Iterable[RenderableType]:
    made = table("expert parallel over", "bytes/token before", "after, equal counts", "saving")
    for ways, row in traffic.items():
        made.add_row(ways, f"{row['before']:,.0f}", f"{row['after']:,.0f}", _share(row["before"], row["before"] - row["after"]))
    made.caption = "hidden states sent, from the statistics' search tokens; which experts go, and how many where, compress decides"
    yield made


# ---- inspect


def of_model(about: dict[str, Any]) -> RenderableType:
    """Everything that inspect says."""
    head = Text.assemble(
        (about["model"], "bold"),
        f"  ({about['model_type']}, {', '.join(about['dtypes'])}, {about['files']} files, {about['tensor_bytes']:,} bytes of tensors)",
    )
    if not about["supported"]:
        return Group(head, Text.assemble(("not supported: ", "bold red"), about["reason"]))
    parts: list[RenderableType] = [head, _facts(about), _bytes(about), *_engines(about)]
    made = table("method", "", left=2)
    for name, answer in about["methods"].items():
        made.add_row(name, Text(answer, "green" if answer == "yes" else "yellow"))
    return _apart(*parts, made)


def _facts(about: dict[str, Any]) -> Table:
    router, size = about["router"], about["size"]
    words = [router["score"], "renormalised" if router["renormalise"] else "not renormalised"]
    words += ["correction bias"] if router["correction_bias"] else []
    words += [f"{router['groups']} groups, {router['topk_group']} used"] if router["groups"] > 1 else []
    words += [f"scaled by {router['scale']:g}"] if router["scale"] != 1 else []
    counts = " / ".join(map(str, sorted(set(about["experts"].values()))))
    made = table("structure", "", left=2)
    made.add_row("layers", f"{about['layers']}, {len(about['moe_layers'])} of them MoE; context {about['context']:,}")
    made.add_row("experts", f"{counts} a layer, {about['top_k']} used per token; hidden {about['hidden']}, width {about['expert_width']}")
    made.add_row("router", f"{', '.join(words)}; keeps at least {router['fewest_experts']} experts")
    made.add_row("parameters", f"{size['parameters']:,}; {size['active']:,} active per token, {size['experts']:,} in routed experts")
    made.add_row("FLOPs per token", f"{short(size['flops'])} at a context of {about['flops_context']:,}")
    if about["cache"] is None:
        made.add_row("cache", "not known: the architecture does not run hollow")
    else:
        kinds = "; ".join(f"{row['layers']} layers: {row['keeps']}" for row in about["cache"])
        made.add_row("cache", f"{human(size['cache_bytes'])} for {PER:,} tokens of a sequence ({kinds})")
    return made


def _bytes(about: dict[str, Any]) -> Table:
    made = table("bytes of tensors", "", "", "share")
    for name, value in about["bytes"].items():
        made.add_row(name, f"{value:,}", human(value), f"{value / about['tensor_bytes']:.1%}")
    return made
