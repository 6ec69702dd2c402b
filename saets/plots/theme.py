"""The one theme of all charts, and the sizes for which they are made: a screen, or the column or page of a printed paper."""

from __future__ import annotations

from typing import Any, NamedTuple

PIXELS_PER_INCH, POINTS_PER_INCH = 96, 72
"""Of an SVG, by CSS: a chart of 312 pixels is 3.25 inches wide."""

FONT = "Arial, Helvetica, sans-serif"


class Size(NamedTuple):
    """For what a chart is made; lengths in pixels, of which a point of print has 4/3."""

    name: str
    width: int
    """Of the whole chart."""
    columns: int
    """Panels in a row, at most."""
    aspect: float
    """A panel's height over its width."""
    small: float
    """Font of labels and of text in the panels."""
    large: float
    """Font of axis titles, legends and panel titles."""
    marks: float
    """Lines and symbols, relative to those on a screen."""
    dots_per_inch: int
    """Of a PNG."""
    titled: bool
    """Whether title and subtitle stand above; a paper has a caption below."""


SCREEN = Size("screen", width=960, columns=3, aspect=0.73, small=11, large=12.5, marks=1.0, dots_per_inch=192, titled=True)
PAGE = Size("page", width=648, columns=3, aspect=0.73, small=9.33, large=10.67, marks=0.8, dots_per_inch=384, titled=False)
COLUMN = Size("column", width=312, columns=2, aspect=0.8, small=8.67, large=9.33, marks=0.7, dots_per_inch=384, titled=False)
SIZES = {size.name: size for size in (SCREEN, PAGE, COLUMN)}
"""A page of two columns is 6.75 inches wide, one of them 3.25; print has letters of 6.5 to 8 points."""


def theme(size: Size = SCREEN, panel: float = 300.0) -> dict[str, Any]:
    """The configuration of every chart, for `alt.Chart(..., config=theme())`; `panel` is the width of one in pixels."""
    small, large, gap = size.small, size.large, size.small * size.marks
    return {
        "background": "white",
        "padding": 12 if size.titled else 2,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            "labelFontSize": small,
            "titleFontSize": large,
            "titleFontWeight": "normal",
            "gridColor": "#e6e6e6",
            "tickCount": 5,
            "titlePadding": 0.5 * gap,
        },
        "axisX": {"labelFlush": False, "tickCount": int(panel // 45)},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 0.5 * gap},
        # A series' dash would otherwise fray the edge of its symbol.
        "legend": {
            "labelFontSize": large,
            "titleFontSize": large,
            "titleFontWeight": "normal",
            "orient": "top",
            "symbolSize": 90 * size.marks**2,
            "symbolOpacity": 1,
            "symbolStrokeWidth": 0,
            "labelLimit": 0.8 * size.width,
            "offset": gap,
        },
        "header": {"labelFontSize": large, "labelFontWeight": "bold", "labelPadding": 0.4 * gap},
        "title": {"fontSize": 15, "anchor": "start", "subtitleFontSize": 12, "subtitleColor": "#444444", "offset": 14},
        "facet": {"spacing": 2.2 * gap},
        "text": {"fontSize": small},
    }
