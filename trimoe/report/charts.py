"""One function per chart: plain values in, an Altair chart out. Single or layered views only, so that a page may set their width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from trimoe.errors import UserError

try:
    import altair as alt
except ImportError:
    raise UserError("Charts need altair; pip install 'trimoe[report]'.") from None

WIDTH, HEIGHT = 640, 320  # of exported figures; a page sets its own width
SPREAD = 40  # largest over smallest value above which an axis is logarithmic


def frontier(points: Sequence[dict[str, Any]]) -> alt.LayerChart:
    """Size against KL. Each point: name, method, bytes, share (of the original's bytes), kl (nats/token), kl_low, kl_high (or None).

    The dashed line joins the points that no other beats in both.
    """
    logarithmic = _logarithmic([point["kl"] for point in points])
    rows = labelled([{**point, "low": point["kl_low"], "high": point["kl_high"]} for point in points], logarithmic)
    scale = alt.Scale(type="log", nice=True) if logarithmic else alt.Scale(zero=True, nice=True)
    x = alt.X(
        "share:Q",
        title="size, share of the original's bytes",
        axis=alt.Axis(format="%", tickCount=6),
        scale=alt.Scale(zero=False, padding=24),
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
    return _layered(
        HEIGHT + 40,
        front.encode(x=x, y=y, order="share:Q"),
        whiskers.encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color),
        names.encode(x=x, y=y, text="label:N"),
        base.mark_point(size=110, opacity=1).encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip),
    )


def labelled(rows: Sequence[dict[str, Any]], logarithmic: bool) -> list[dict[str, Any]]:
    """The frontier's points with `front`, and their names where one of four places beside the point is free of points and other names
    (`label`, `align`, `dx`, `dy`; those of the front first). Reckoned for the width of an exported figure."""
    high = [math.log(row["kl"]) if logarithmic else row["kl"] for row in rows]
    share = [row["share"] for row in rows]
    x = [(value - min(share)) / (max(share) - min(share) or 1) * (WIDTH - 120) for value in share]
    y = [-(value - min(high)) / (max(high) - min(high) or 1) * HEIGHT for value in high]
    front = [
        not any(
            other["share"] <= row["share"] and other["kl"] <= row["kl"] and (other["share"], other["kl"]) != (row["share"], row["kl"])
            for other in rows
        )
        for row in rows
    ]
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


def _logarithmic(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > SPREAD


def _layered(height: int, *layers: alt.Chart) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers), width=WIDTH, height=height)


def _data(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=list(rows))
