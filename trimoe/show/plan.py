"""Plans and structure as tables: on a terminal in its width and with colours, elsewhere plain in 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from trimoe.show.answer import Answer
from trimoe.show.form import form_of
from trimoe.show.format import COUNTS, GONE, PER, bounds, human, runs, short
from trimoe.show.table import Fitting, Table, rendered

CACHE = f"cache/{PER // 1000}K"


def plain(plan: dict[str, Any]) -> str:
    """`plan` (its JSON) without colours, 80 columns wide."""
    return rendered(of_plan(plan))


def of_plan(plan: dict[str, Any]) -> RenderableType:
    """Everything that a plan says; under "passes" it may have passes.py's rows, under "traffic" what statistics say of routing."""
    head = Text.assemble((plan["model"], "bold"), f" -> {form_of(plan)} checkpoint")
    parts: list[RenderableType] = [head, _totals(plan), _layers(plan), _engines(plan), *_measured(plan), _resources(plan)]
    parts += [show(plan[name]) for name, show in (("passes", _passes), ("traffic", _traffic)) if plan.get(name)]
    return _apart(*parts, *(Text.assemble(("warning: ", "bold yellow"), warning) for warning in plan["warnings"]))


def _apart(*parts: RenderableType) -> Group:
    """With an empty line between tables."""
    return Group(*(piece for part in parts for piece in ((Text(""), part) if isinstance(part, Fitting) else (part,))))


def _totals(plan: dict[str, Any]) -> Fitting:
    """Where there is little room, without the shares, or with what comes out alone."""
    made = Table(head=("", "before", "after", "share"), rows=list(_total_rows(plan)))
    return Fitting([made, made.without("share"), made.without("before", "share")], wraps=True)


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
    rows: list[Sequence[str]] = []

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        after = row["after"]
        cached = after["cache"]
        return (
            f"{row['experts']} -> {_left(row)}" if row["experts"] else "dense", _form(row), human(after["bytes"]),
            short(after["parameters"], COUNTS), short(after["active"], COUNTS), short(after["flops"]), "?" if cached is None else human(cached["bytes"]),
        )  # fmt: skip

    for same, run in groupby(plan["layers"], cells):
        numbers = [row["layer"] for row in run]
        rows.append((runs(numbers), *same))
    rest = plan["dense_layers"]
    if rest["count"]:
        parameters, flops = short(rest["parameters"][1], COUNTS), short(rest["flops"][1])
        rows.append(("others", f"{rest['count']} dense", "", human(rest["bytes"][1]), parameters, "", flops, ""))
    open_ = any(row["kept"] is None for row in plan["layers"])
    going = open_ and any(name in ("layer_drop", "block_drop") for step in plan["recipe"]["steps"] for name in step)
    made = Table(
        head=("layer", "experts", "form", "tensor bytes", "params", "active", "FLOPs", CACHE), rows=rows, words=range(3),
        caption="each layer as it is if it stays: which ones go is decided on the calibration text" if going else "",
    )  # fmt: skip
    last = ("params", "active", "FLOPs", CACHE)
    return Fitting([made.without(*last[place:]) for place in (4, 3, 2, 1, 0)])


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


def _engines(plan: dict[str, Any]) -> Fitting:
    colours = {"yes": "green", "no": "red"}
    answers = plan["loads_in"].items()
    return _facing("loads in", [(engine, Text(words, colours.get(Answer.from_json(words).loads, "yellow"))) for engine, words in answers])


def _facing(name: str, rows: Sequence[tuple[str, Any]]) -> Fitting:
    """Return a table of names and what is to be said of each."""
    return Fitting([Table(head=(name, ""), rows=rows, words=range(2))])


def _measured(plan: dict[str, Any]) -> Iterator[Fitting]:
    """On how much text what is still open will be decided."""
    rows = plan.get("measured_on") or ()
    if not rows:
        return
    cells, steps = [], {row["step"] for row in rows}
    for row in rows:
        words = f"{row['samples']:,} samples, {row['versions']} versions of the model" if "samples" in row else ""
        if "routed" in row:
            words = f"{row['routed']:,} an expert, on average" + (
                f"; {row['wanted']:,} do not fit" if row["tokens"] < row["wanted"] else ""
            )
        cells.append((row["name"] + (f", step {row['step'] + 1}" if len(steps) > 1 else ""), f"{row['tokens']:,}", words))
    yield Fitting([Table(head=("decided on", "tokens", ""), rows=cells, words=(0, 2))])


def _resources(plan: dict[str, Any]) -> Fitting:
    rows = []
    for label, stages in (("memory, at most about", plan["memory_split"]), ("memory of the device", plan.get("device_split"))):
        if stages:
            by_stage = "; ".join(f"{name}: {human(size)}" for name, size in stages.items())
            rows.append((label, human(max(stages.values())) + (f" ({by_stage})" if len(stages) > 1 else "")))
    split = plan["disk_split"]
    beside = "" if len(split) == 1 else " (" + "; ".join(f"{name}: {human(size)}" for name, size in split.items()) + ")"
    rows.append(("disk", human(plan["disk"]) + beside))
    if plan["spill"]:
        rows.append(("disk for TMPDIR", human(plan["spill"])))
    return _facing("to make it here", rows)


def _passes(rows: list[dict[str, Any]]) -> Fitting:
    """How often each stage goes through the model; where there is little room, without the versions that walk side by side."""
    cells = [
        (row["stage"], str(row["passes"]), f"{row['tokens']:,}", str(row["versions"]),
         *("" if row[name] is None else human(row[name]) for name in ("read_bytes", "written_bytes")))
        for row in rows
    ]  # fmt: skip
    made = Table(head=("passes over the model", "times", "tokens", "versions", "read", "written"), rows=cells)
    narrower = [made.without("versions"), made.without("times", "versions"), made.without("times", "tokens", "versions")]
    return Fitting([made, *narrower])


def _traffic(traffic: dict[str, Any]) -> Fitting:
    rows = [
        (ways, f"{row['before']:,.0f}", f"{row['after']:,.0f}", _share(row["before"], row["before"] - row["after"]))
        for ways, row in traffic.items()
    ]
    return Fitting([Table(
        head=("expert parallel over", "bytes/token before", "after, equal counts", "saving"), rows=rows,
        caption="hidden states sent, from the statistics' search tokens; which experts go, and how many where, compress decides",
    )])  # fmt: skip


# ---- inspect


def of_model(about: dict[str, Any]) -> RenderableType:
    """Everything that inspect says."""
    head = Text.assemble(
        (about["model"], "bold"),
        f"  ({about['model_type']}, {', '.join(about['dtypes'])}, {about['files']} files, {about['tensor_bytes']:,} bytes of tensors)",
    )
    if not about["supported"]:
        return Group(head, Text.assemble(("not supported: ", "bold red"), about["reason"]))
    parts: list[RenderableType] = [head, _facts(about), _bytes(about), _engines(about)]
    methods = [(name, Text(answer, "green" if answer == "yes" else "yellow")) for name, answer in about["methods"].items()]
    return _apart(*parts, _facing("method", methods))


def _facts(about: dict[str, Any]) -> Fitting:
    router, size = about["router"], about["size"]
    words = [router["score"], "renormalised" if router["renormalise"] else "not renormalised"]
    words += ["correction bias"] if router["correction_bias"] else []
    words += [f"{router['groups']} groups, {router['topk_group']} used"] if router["groups"] > 1 else []
    words += [f"scaled by {router['scale']:g}"] if router["scale"] != 1 else []
    counts = " / ".join(map(str, sorted(set(about["experts"].values()))))
    if about["cache"] is None:
        cache = "not known: the architecture does not run hollow"
    else:
        kinds = "; ".join(f"{row['layers']} layers: {row['keeps']}" for row in about["cache"])
        cache = f"{human(size['cache_bytes'])} for {PER:,} tokens of a sequence ({kinds})"
    return _facing("structure", [
        ("layers", f"{about['layers']}, {len(about['moe_layers'])} of them MoE; context {about['context']:,}"),
        ("experts", f"{counts} a layer, {about['top_k']} used per token; hidden {about['hidden']}, width {about['expert_width']}"),
        ("router", f"{', '.join(words)}; keeps at least {router['fewest_experts']} experts"),
        ("parameters", f"{size['parameters']:,}; {size['active']:,} active per token, {size['experts']:,} in routed experts"),
        ("FLOPs per token", f"{short(size['flops'])} at a context of {about['flops_context']:,}"),
        ("cache", cache),
    ])  # fmt: skip


def _bytes(about: dict[str, Any]) -> Fitting:
    rows = [(name, f"{value:,}", human(value), f"{value / about['tensor_bytes']:.1%}") for name, value in about["bytes"].items()]
    return Fitting([Table(head=("bytes of tensors", "", "", "share"), rows=rows)])
