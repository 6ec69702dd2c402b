"""A chart's files: HTML that needs no network, SVG, PNG and PDF."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import vl_convert

from saets.errors import unknown
from saets.files.storage import Location, Where, locate
from saets.plots.panels import Plot
from saets.plots.theme import PIXELS_PER_INCH, POINTS_PER_INCH, SCREEN, Size
from saets.records import content_id

FORMATS = ("html", "svg", "png", "pdf")
DEFAULT_FORMATS = ("html", "svg", "png")


def file_name(name: str) -> str:
    """The name with only letters, digits, `.`, `_` and `-`; a name that had to be changed ends in a hash of the original."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    return safe if safe == name != "" else f"{safe or 'plot'}-{content_id(name)[:8]}"


def save(
    chart: Plot, folder: Where, name: str, formats: Sequence[str] = DEFAULT_FORMATS, *, size: Size = SCREEN
) -> list[Location]:
    """Write the chart in each of the formats, whole or not at all; returns the files, called `file_name(name)`.

    HTML needs no network. `size` is the one the chart was made for: it says how fine a PNG is. `folder` is a local path or a URI.

    Raises:
        InputError: an unknown format, or the folder cannot be written.
    """
    files = []
    for kind in formats:
        if kind not in _CONTENTS:
            raise unknown("format", kind, FORMATS)
        file = locate(folder) / f"{file_name(name)}.{kind}"
        file.write_bytes(_CONTENTS[kind](chart, size))
        files.append(file)
    return files


def _html(chart: Plot, size: Size) -> bytes:
    actions = {"export": True, "source": False, "compiled": False, "editor": False}
    page: str = chart.to_html(inline=True, embed_options={"actions": actions}, json_kwds={"cls": _ScriptSafe})
    return page.encode()


def _svg(chart: Plot, size: Size) -> bytes:
    svg = io.StringIO()
    chart.save(svg, format="svg")
    return svg.getvalue().encode()


def _png(chart: Plot, size: Size) -> bytes:
    png = io.BytesIO()
    # vl-convert takes a pixel for a point of print.
    chart.save(png, format="png", scale_factor=POINTS_PER_INCH / PIXELS_PER_INCH, ppi=size.dots_per_inch)
    return png.getvalue()


def _pdf(chart: Plot, size: Size) -> bytes:
    """vl-convert takes a pixel for a point of print here too, so the outer lengths of the SVG are given in points."""

    def in_points(found: re.Match[str]) -> str:
        return f'{found[1]}="{float(found[2]) * POINTS_PER_INCH / PIXELS_PER_INCH:g}"'

    svg = re.sub(r'\b(width|height)="([\d.]+)"', in_points, _svg(chart, size).decode(), count=2)
    pdf: bytes = vl_convert.svg_to_pdf(svg)
    return pdf


_CONTENTS = dict(zip(FORMATS, (_html, _svg, _png, _pdf), strict=True))


class _ScriptSafe(json.JSONEncoder):
    """JSON inside a script element: a goal's name must not be able to end it."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", r"\u003c")
