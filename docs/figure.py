"""Draw figure.svg and figure-dark.svg from the cells of log/ that figure.json names.

It needs altair and vl-convert-python.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
from reference import cell

HERE = Path(__file__).resolve().parent
COLOURS = {  # by method: in light, in dark
    "4 and 8 bits": ("#0f766e", "#2dd4bf"),
    "dropped, and 4 bits": ("#7c3aed", "#c4b5fd"),
    "low rank": ("#b45309", "#fbbf24"),
    "experts dropped": ("#1d4ed8", "#93c5fd"),
    "layers dropped": ("#be123c", "#fda4af"),
}
LABELS = {"right": dict(align="left", dx=9, dy=0), "left": dict(align="right", dx=-9, dy=0), "above": dict(align="center", dx=0, dy=-12)}


def chart(about: dict[str, Any], *, dark: bool) -> alt.LayerChart:
    ink, faint = ("#e6edf3", "#30363d") if dark else ("#1f2328", "#d8dee4")
    rows = [{**point, "bytes": float(cell(point["bytes"])), "kl": float(cell(point["kl"]))} for point in about["points"]]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "bytes:Q",
            title="bytes of the checkpoint, % of the original",
            scale=alt.Scale(domain=[15, 105]),
            axis=alt.Axis(values=[20, 30, 40, 50, 60, 70, 80, 90, 100]),
        ),
        y=alt.Y(
            "kl:Q",
            title="KL to the original, nats per token",
            scale=alt.Scale(type="log", domain=[0.0001, 1]),
            axis=alt.Axis(values=[0.0001, 0.001, 0.01, 0.1, 1], format="~g"),
        ),
        color=alt.Color(
            "method:N",
            title=None,
            scale=alt.Scale(domain=list(COLOURS), range=[pair[dark] for pair in COLOURS.values()]),
            legend=alt.Legend(orient="top", symbolType="circle", columns=5, columnPadding=22, symbolSize=90, labelLimit=200),
        ),
    )
    points = base.mark_circle(size=90, opacity=1)
    names = [
        base.transform_filter(alt.datum.label == where).mark_text(baseline="middle", fontSize=11, **offset).encode(text="name:N")
        for where, offset in LABELS.items()
    ]
    return (
        alt.layer(points, *names)
        .properties(width=700, height=340, background="transparent", padding=8)
        .configure(font="Helvetica, Arial, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=ink, titleColor=ink, gridColor=faint, domainColor=faint, tickColor=faint, labelFontSize=11, titleFontSize=12
        )
        .configure_legend(labelColor=ink, labelFontSize=12)
    )


if __name__ == "__main__":
    about = json.loads((HERE / "figure.json").read_text(encoding="utf-8"))
    for name, dark in (("figure.svg", False), ("figure-dark.svg", True)):
        chart(about, dark=dark).save(HERE / name)
        print(f"docs/{name}")
