"""A chart's files: HTML that needs no network, SVG and PNG."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from saets.files.storage import Location, Where, locate
from saets.plots.panels import Plot
from saets.records import content_id


def file_name(name: str) -> str:
    """The name with only letters, digits, `.`, `_` and `-`; a name that had to be changed ends in a hash of the original."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    return safe if safe == name != "" else f"{safe or 'plot'}-{content_id(name)[:8]}"


def save(chart: Plot, folder: Where, name: str) -> list[Location]:
    """Write the chart as HTML that needs no network, SVG and PNG (two pixels a point), each whole or not at all.

    `folder` is a local path or a URI. Returns the three files, called `file_name(name)`.

    Raises:
        InputError: the folder cannot be written.
    """
    svg, png = io.StringIO(), io.BytesIO()
    chart.save(svg, format="svg")
    chart.save(png, format="png", scale_factor=2)
    actions = {"export": True, "source": False, "compiled": False, "editor": False}
    html = chart.to_html(inline=True, embed_options={"actions": actions}, json_kwds={"cls": _ScriptSafe})
    files = []
    for kind, content in {"html": html.encode(), "svg": svg.getvalue().encode(), "png": png.getvalue()}.items():
        file = locate(folder) / f"{file_name(name)}.{kind}"
        file.write_bytes(content)
        files.append(file)
    return files


class _ScriptSafe(json.JSONEncoder):
    """JSON inside a script element: a goal's name must not be able to end it."""

    def encode(self, o: Any) -> str:
        return super().encode(o).replace("<", r"\u003c")
