"""How charts look on light and on dark paper: Vega configurations. Specs name no colour; they take categories and ramps from here."""

from __future__ import annotations

from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Helvetica, Arial, sans-serif"
ENTRY = 130  # pixels that an entry of a legend may take


def _config(
    ink: str, soft: str, grid: str, paper: str, categories: list[str], ramp: list[str], deep: list[str], missing: str
) -> dict[str, Any]:
    labels = {"labelColor": soft, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": 600}
    return {
        "background": "transparent", "font": FONT, "view": {"stroke": None},
        "axis": {**labels, "gridColor": grid, "domainColor": soft, "tickColor": soft, "titlePadding": 8, "labelOverlap": True},
        "legend": {**labels, "orient": "top", "symbolSize": 110, "labelLimit": 240, "titleLimit": 320, "gradientLength": 180, "columns": 4},
        "title": {"color": ink, "subtitleColor": soft, "anchor": "start"},
        "range": {"category": categories, "ramp": ramp, "heatmap": ramp, "ordinal": deep},
        "text": {"color": ink, "fontSize": 12}, "rule": {"color": ink}, "mark": {"color": categories[0], "invalid": None},
        "bar": {"color": categories[0]}, "point": {"filled": True, "size": 80, "color": categories[0]},
        "line": {"strokeWidth": 2, "color": categories[0]}, "rect": {"color": missing}, "square": {"color": missing},
        "style": {"guide-label": {"font": FONT}, "guide-title": {"font": FONT}},
    }  # fmt: skip


LIGHT = _config(
    "#1a1f26", "#525c67", "#e3e7ec", "#ffffff",
    ["#1f6fb4", "#c2410c", "#23803f", "#8446a8", "#946b00", "#b42a63", "#4d5a66", "#0c7f7f"],
    ["#e1ecf7", "#bfd8ee", "#86b7e0", "#3f8bc7", "#1a5c9c", "#0a2f5e"], ["#8ab4de", "#1f6fb4", "#0a2747"], "#d5dae0",
)  # fmt: skip
DARK = _config(
    "#e8ebf0", "#aeb8c3", "#2e3640", "#171b21",
    ["#6cb2f5", "#ff9a5c", "#5fcf85", "#c79bf0", "#e3bd4a", "#ff86b3", "#b3c0cc", "#54cfcf"],
    ["#22374c", "#244e78", "#2b6cab", "#4d98db", "#93c5f2", "#e4f1fd"], ["#2f6aa6", "#6cb2f5", "#eaf4fe"], "#3a434d",
)  # fmt: skip
