"""One function per chart: plain values in, an Altair chart out. Single or layered views only, so that a page may set their width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimoe.errors import UserError
from trimoe.show.frontier import unbeaten

try:
    import altair as alt
except ImportError:
    raise UserError("Charts need altair; pip install 'trimoe[report]'.") from None

WIDTH, HEIGHT = 640, 320  # of exported figures; a page sets its own width
NARROW = 0.1  # of the original's bytes: the least that an axis of sizes spans
SPREAD = 40  # largest over smallest value above which an axis is logarithmic


def frontier(points: Sequence[dict[str, Any]], *, alike: bool = True) -> alt.LayerChart:
    """Size against KL. Each point: name, method, bytes, share (of the original's bytes), kl (nats/token), kl_low, kl_high (or None).

    The dashed line joins the points that no other beats in both; there is none where they were not measured `alike`.
    """
    logarithmic = _logarithmic([point["kl"] for point in points])
    rows = labelled([{**point, "low": point["kl_low"], "high": point["kl_high"]} for point in points], logarithmic)
    scale = _scale(logarithmic, zero=True)
    x = alt.X(
        "share:Q",
        title="size, share of the original's bytes",
        axis=alt.Axis(format="%", tickCount=6),
        scale=_at_least(NARROW, [point["share"] for point in points]),
    )
    y = alt.Y("kl:Q", title="KL to the original, nats/token", scale=scale, axis=alt.Axis(tickCount=6))
    methods = sorted({point["method"] for point in points})  # named, so that colours and shapes share one legend
    color = alt.Color("method:N", scale=alt.Scale(domain=methods, range="category"))
    shape = alt.Shape("method:N", scale=alt.Scale(domain=methods))
    tooltip = [
        alt.Tooltip("name:N", title="result"), alt.Tooltip("method:N"), alt.Tooltip("bytes:Q", format=",", title="bytes"),
        alt.Tooltip("share:Q", format=".1%", title="share"), alt.Tooltip("kl:Q", format=".4f", title="KL, nats/token"),
        alt.Tooltip("low:Q", format=".4f", title="95 % from"), alt.Tooltip("high:Q", format=".4f", title="95 % to"),
    ]  # fmt: skip
    base = alt.Chart(_data(rows))
    front = base.transform_filter("datum.front").mark_line(strokeDash=[5, 4], strokeWidth=1.5, opacity=0.7)
    whiskers = base.transform_filter("isValid(datum.low) && isValid(datum.high)").mark_rule(strokeWidth=2)
    names = base.transform_filter("datum.label != ''").mark_text(
        align=alt.ExprRef("datum.align"),
        dx=alt.ExprRef("datum.dx"),
        dy=alt.ExprRef("datum.dy"),
        fontSize=alt.ExprRef("width < 440 ? 0 : 12"),
    )
    layers = [
        *([front.encode(x=x, y=y, order="share:Q")] if alike else []),
        names.encode(x=x, y=y, text="label:N"),
        base.mark_point(size=110, opacity=1).encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
    ]
    if any(row["low"] is not None for row in rows):
        layers.insert(0, whiskers.encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color))
    return _layered(HEIGHT + 40, *layers)


def labelled(rows: Sequence[dict[str, Any]], logarithmic: bool) -> list[dict[str, Any]]:
    """The frontier's points with `front`, and their names where one of four places beside the point is free of points and other names
    (`label`, `align`, `dx`, `dy`; those of the front first). Reckoned for the width of an exported figure."""
    high = [math.log(row["kl"]) if logarithmic else row["kl"] for row in rows]
    share = [row["share"] for row in rows]
    x = [(value - min(share)) / (max(share) - min(share) or 1) * (WIDTH - 120) for value in share]
    y = [-(value - min(high)) / (max(high) - min(high) or 1) * HEIGHT for value in high]
    front = unbeaten([(row["share"], row["kl"]) for row in rows])
    taken = [(px - 7, py - 7, px + 7, py + 7) for px, py in zip(x, y, strict=True)]
    out = [{**row, "front": on, "label": "", "align": "left", "dx": 0, "dy": 0} for row, on in zip(rows, front, strict=True)]
    for at in sorted(range(len(rows)), key=lambda at: not front[at]):
        length = min(160, 7 * len(rows[at]["name"]))
        for align, dx, dy in (("left", 10, -9), ("left", 10, 11), ("right", -10, -9), ("right", -10, 11)):
            left = x[at] + dx - (length if align == "right" else 0)
            box = (left, y[at] + dy - 8, left + length, y[at] + dy + 6)
            if left > -60 and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                out[at] |= {"label": rows[at]["name"], "align": align, "dx": dx, "dy": dy}
                break
    return out


def heat(
    rows: Sequence[dict[str, Any]], *, value: str, title: str, marked: str, across: str = "expert", limits: tuple[float, float] | None = None,
    more: Sequence[alt.Tooltip] = (),
) -> alt.LayerChart:  # fmt: skip
    """Layers x experts. Each row: layer, expert, `value` (a number or None), marked (bool: gets a cross). `more`: other columns to hover."""
    layers = len({row["layer"] for row in rows})
    size = 26 if layers <= 16 else 18 if layers <= 40 else 12
    x = alt.X("expert:O", title=across, axis=alt.Axis(labelAngle=0, grid=False))
    y = alt.Y("layer:O", title="layer", axis=alt.Axis(grid=False))
    tooltip = [alt.Tooltip("layer:O"), alt.Tooltip("expert:O", title=across), alt.Tooltip(f"{value}:Q", title=title, format=".3~g"), *more]
    scale = alt.Scale(domain=list(limits), range="heatmap") if limits else alt.Scale(range="heatmap")
    base = alt.Chart(_data(rows))
    return _layered(
        layers * size,
        base.mark_rect().encode(x=x, y=y, tooltip=tooltip),  # where there is no number
        base.transform_filter(f"isValid(datum.{value})").mark_rect(stroke=None).encode(
            x=x, y=y, color=alt.Color(f"{value}:Q", title=title, scale=scale), tooltip=tooltip
        ),
        base.transform_filter(f"datum.{marked}").mark_text(text="\u00d7", fontSize=size * 0.75, fontWeight="bold").encode(x=x, y=y, tooltip=tooltip),
    )  # fmt: skip


def bars(
    rows: Sequence[dict[str, Any]], *, x: str, y: str, y_title: str, x_title: str | None = None, series: str | None = None,
    stacked: bool = False, faint: str = "", form: str = ".3~g", height: int = 240, order: Sequence[str] | None = None,
) -> alt.LayerChart:  # fmt: skip
    """Columns over the names or numbers in `x`: of one value `y`, or of several `series` (stacked, or side by side with whiskers from `low`
    to `high` where a row has them; one series may be `faint`)."""
    names = list(order or dict.fromkeys(row[series] for row in rows)) if series else []
    base = alt.Chart(_data(rows))
    across = alt.X(
        f"{x}:O",
        title=x_title,
        sort=None,
        axis=alt.Axis(labelAngle=0 if _short([row[x] for row in rows]) else -35, grid=False, labelLimit=140),
        scale=alt.Scale(paddingInner=0.25, paddingOuter=0.15),
    )
    up = alt.Y(f"{y}:Q", title=y_title, stack="zero" if stacked else None, scale=_scale(False, zero=True), axis=alt.Axis(tickCount=5))
    tooltip = [alt.Tooltip(f"{x}:N", title=x_title or x), alt.Tooltip(f"{y}:Q", title=y_title, format=form)]
    encoding: dict[str, Any] = {"x": across, "y": up}
    offset = {}
    if series:
        tooltip.insert(0, alt.Tooltip(f"{series}:N"))
        encoding["color"] = alt.Color(f"{series}:N", title=None, sort=names, scale=alt.Scale(domain=names, range="category"))
        if stacked:
            encoding["order"] = alt.Order("place:Q")
            rows = [{**row, "place": names.index(row[series])} for row in rows]
            base = alt.Chart(_data(rows))
        else:
            offset = {"xOffset": alt.XOffset(f"{series}:N", sort=names)}
    solid = alt.ExprRef(f"datum.{series} == '{faint}' ? 0.35 : 1") if faint else 1
    columns = base.mark_bar(cornerRadiusEnd=0 if stacked else 2, opacity=solid)
    layers = [columns.encode(**encoding, **offset, tooltip=[*tooltip, *_interval(rows, form)])]
    if any(row.get("low") is not None for row in rows):
        whiskers = base.transform_filter("isValid(datum.low) && isValid(datum.high)").mark_rule(strokeWidth=2)
        layers.append(whiskers.encode(x=across, y=alt.Y("low:Q", title=y_title), y2="high:Q", **offset))
    return _layered(height, *layers)


def lines(
    rows: Sequence[dict[str, Any]], *, x: str, y: str, x_title: str, y_title: str, series: str, numeric: bool = False, log_x: bool = False,
    log_y: bool = False, step: bool = False, form: str = ".4~g", order: Sequence[str] | None = None,
) -> alt.LayerChart:  # fmt: skip
    """Lines of `series` (named, or numbers if `numeric`: then shaded by their number); points to hover over."""
    names = list(order or dict.fromkeys(row[series] for row in rows))
    across = alt.X(f"{x}:Q", title=x_title, scale=_scale(log_x, nice=not log_x), axis=alt.Axis(tickCount=6, grid=not log_x))
    up = alt.Y(f"{y}:Q", title=y_title, scale=_scale(log_y), axis=alt.Axis(tickCount=5, grid=not log_y))
    if numeric:
        color = alt.Color(
            f"{series}:Q", title=series, scale=alt.Scale(range="ordinal"), legend=alt.Legend(tickCount=min(8, len(names)), format="d")
        )
        detail: dict[str, Any] = {"detail": f"{series}:N"}
    else:
        color = alt.Color(f"{series}:N", title=None, sort=names, scale=alt.Scale(domain=names, range="category"))
        if len(names) == 1:
            color["legend"] = None
        detail = {"strokeDash": alt.StrokeDash(f"{series}:N", legend=None, sort=names)} if len(names) > 1 else {}
    tooltip = [alt.Tooltip(f"{series}:N"), alt.Tooltip(f"{x}:Q", title=x_title), alt.Tooltip(f"{y}:Q", title=y_title, format=form)]
    base = alt.Chart(_data(rows))
    return _layered(
        HEIGHT - 40,
        base.mark_line(interpolate="step-after" if step else "linear").encode(x=across, y=up, color=color, **detail),
        base.mark_point(size=24 if len(rows) > 40 else 50, opacity=1).encode(x=across, y=up, color=color, tooltip=tooltip),
    )


def dots(
    rows: Sequence[dict[str, Any]], *, y: str, x: str, x_title: str, series: str | None = None, rule: float | None = None, form: str = ".4~g",
    order: Sequence[str] | None = None, percent: bool = False, zero: bool = False,
) -> alt.LayerChart:  # fmt: skip
    """Points with whiskers (`low`, `high`), one line of the chart per name in `y` (which may have several lines), of several `series` beside
    each other; `rule`: a value to compare with."""
    names = list(order or dict.fromkeys(row[series] for row in rows)) if series else []
    lines_ = len({row[y] for row in rows})
    across = alt.X(
        f"{x}:Q", title=x_title, scale=_scale(False, zero=zero, padding=0 if zero else 12),
        axis=alt.Axis(format="%" if percent else "", tickCount=6),
    )  # fmt: skip
    split = "split(datum.label, '\\n')" if any("\n" in row[y] for row in rows) else alt.Undefined
    down = alt.Y(f"{y}:N", title=None, sort=None, axis=alt.Axis(grid=True, labelLimit=170, labelExpr=split))
    encoding: dict[str, Any] = {"x": across, "y": down}
    color: dict[str, Any] = {}
    shape: dict[str, Any] = {}
    tooltip = [alt.Tooltip(f"{y}:N"), alt.Tooltip(f"{x}:Q", title=x_title, format=form), *_interval(rows, form)]
    if series:
        color = {
            "color": alt.Color(f"{series}:N", title=None, scale=alt.Scale(domain=names, range="category")), "yOffset": alt.YOffset(f"{series}:N", sort=names),
        }  # fmt: skip
        shape = {"shape": alt.Shape(f"{series}:N", title=None, scale=alt.Scale(domain=names))}
        tooltip.insert(0, alt.Tooltip(f"{series}:N"))
    base = alt.Chart(_data(rows))
    layers = [base.mark_point(size=90, opacity=1).encode(**encoding, **color, **shape, tooltip=tooltip)]
    if any(row.get("low") is not None for row in rows):
        whiskers = base.transform_filter("isValid(datum.low) && isValid(datum.high)").mark_rule(strokeWidth=2)
        layers.insert(0, whiskers.encode(x=alt.X("low:Q", title=x_title), x2="high:Q", y=down, **color))
    if rule is not None:
        layers.insert(0, alt.Chart(_data([{"rule": rule}])).mark_rule(strokeDash=[5, 4]).encode(x=alt.X("rule:Q", title=x_title)))
    return _layered(max(90, lines_ * ((22 if lines_ <= 16 else 8) + (14 if lines_ <= 16 else 7) * max(1, len(names)))), *layers)


def _scale(logarithmic: bool, *, zero: bool = False, nice: bool = True, padding: float = 0) -> alt.Scale:
    if logarithmic:
        return alt.Scale(type="log", nice=nice)
    return alt.Scale(zero=zero, nice=nice, padding=padding or alt.Undefined)


def _at_least(width: float, values: Sequence[float]) -> alt.Scale:
    """A scale from the least to the largest value that is no narrower than `width`: what hardly differs should look so."""
    low, high = min(values), max(values)
    if high - low >= width:
        return alt.Scale(zero=False, padding=24)
    start = max(0.0, (low + high - width) / 2)
    return alt.Scale(domain=[start, start + width], nice=False)


def _interval(rows: Sequence[dict[str, Any]], form: str) -> list[alt.Tooltip]:
    if all(row.get("low") is None for row in rows):
        return []
    return [alt.Tooltip("low:Q", format=form, title="from"), alt.Tooltip("high:Q", format=form, title="to")]


def _short(names: Sequence[Any]) -> bool:
    """Whether such labels can stand upright below an axis, on a phone too."""
    return len(set(names)) * max((len(str(name)) for name in names), default=0) <= 60


def _logarithmic(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > SPREAD


def _layered(height: int, *layers: alt.Chart) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers), width=WIDTH, height=height)


def _data(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=list(rows))
