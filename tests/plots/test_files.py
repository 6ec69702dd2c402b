"""Files that open anywhere, and sizes for print."""

from __future__ import annotations

import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import altair as alt
import pytest

from saets import plots
from saets.errors import InputError
from tests.plots.charts import CHARTS, EFFECTS, ODD, texts

NINE = ("anger", "christian", "conspiracy", "french", ODD, "love", "praise", "want_to_die", "wedding")


class Scripts(HTMLParser):
    """Counts the script elements of a page and keeps what they and its links load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count = 0
        self.loaded: list[str | None] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count += tag == "script"
        self.loaded += [value for name, value in attrs if name in {"src", "href"} and tag in {"script", "link", "img", "iframe"}]


def png_chunks(path: Path) -> dict[bytes, bytes]:
    """The chunks of a PNG by kind, their checksums proven."""
    data = path.read_bytes()
    chunks: dict[bytes, bytes] = {}
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body, (checksum,) = data[at + 8 : at + 8 + size], struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert zlib.crc32(kind + body) == checksum
        chunks[kind] = chunks.get(kind, b"") + body
        at += 12 + size
    return chunks


def png_bytes(path: Path) -> tuple[int, int, bytes]:
    """Width, height and the filtered scan lines of an 8-bit RGBA picture, its checksums proven."""
    chunks = png_chunks(path)
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    lines = zlib.decompress(chunks[b"IDAT"])
    assert (depth, colour, len(lines)) == (8, 6, height * (1 + 4 * width))
    return width, height, lines


@pytest.mark.parametrize("name", CHARTS)
def test_a_saved_chart_opens_without_a_network(name: str, tmp_path: Path) -> None:
    html, svg, png = plots.save(CHARTS[name](texts(), plots.SCREEN), tmp_path / "plots", name)
    page = Scripts(html.read_text())
    plain = alt.Chart(alt.InlineData(values=[{"x": 1}])).mark_point().encode(x="x:Q").to_html(inline=True)
    assert page.loaded == []
    assert page.count == Scripts(plain).count, "a goal's name must not open a script of its own"
    root = ElementTree.fromstring(svg.read_bytes())
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
    width, height, lines = png_bytes(png)
    assert width > 500
    assert height > 200
    assert len(set(lines)) > 50, "a blank picture has only a handful of different bytes"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted([html.name, svg.name, png.name])


@pytest.mark.parametrize("size", [plots.PAGE, plots.COLUMN])
@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_for_print_fits_its_width_with_letters_that_can_be_read_and_no_title(
    name: str, size: plots.Size, tmp_path: Path
) -> None:
    chart = CHARTS[name](texts(NINE, samples=2), size)
    (svg,) = plots.save(chart, tmp_path, name, ["svg"], size=size)
    page = svg.read_text()
    width = float(ElementTree.fromstring(page).attrib["width"])
    inches = {"page": 6.75, "column": 3.25}[size.name]
    assert width <= 96 * inches
    panels = NINE if name in ("product by scale", "criteria by scale", "coherence and behaviour", "score bars") else ("one",)
    assert width > 0.85 * 96 * inches or len(panels) < size.columns
    letters = [float(found) for found in re.findall(r'font-size="([\d.]+)px"', page)]
    assert 6.5 <= min(letters) * 72 / 96 <= max(letters) * 72 / 96 <= 8.01
    assert "title" not in chart.to_dict()


def test_print_has_more_dots_and_says_so(tmp_path: Path) -> None:
    for size in (plots.SCREEN, plots.COLUMN):
        chart = plots.calibration_histogram(EFFECTS, size=size)
        svg, png = plots.save(chart, tmp_path, size.name, ["svg", "png"], size=size)
        chunks = png_chunks(tmp_path / png.name)
        across, down, unit = struct.unpack(">IIB", chunks[b"pHYs"])
        assert unit == 1, "dots a metre"
        assert across == down == pytest.approx(size.dots_per_inch / 0.0254, rel=1e-3)
        width = float(ElementTree.fromstring(svg.read_text()).attrib["width"])
        assert struct.unpack(">I", chunks[b"IHDR"][:4])[0] == pytest.approx(width * size.dots_per_inch / 96, abs=2)


def test_a_pdf_has_the_width_of_the_size_in_points(tmp_path: Path) -> None:
    chart = plots.calibration_histogram(EFFECTS, size=plots.COLUMN)
    svg, pdf = plots.save(chart, tmp_path, "scales", ["svg", "pdf"], size=plots.COLUMN)
    (box,) = re.findall(rb"/MediaBox ?\[0 0 ([\d.]+) ", pdf.read_bytes())
    assert float(box) == pytest.approx(float(ElementTree.fromstring(svg.read_text()).attrib["width"]) * 72 / 96, abs=1)


def test_only_the_formats_asked_for_are_written(tmp_path: Path) -> None:
    plots.save(plots.calibration_histogram(EFFECTS), tmp_path, "scales", ["svg"])
    assert [path.name for path in tmp_path.iterdir()] == ["scales.svg"]
    with pytest.raises(InputError, match="unknown format 'gif'; known: html, pdf, png, svg"):
        plots.save(plots.calibration_histogram(EFFECTS), tmp_path, "scales", ["gif"])


def test_what_a_chart_shows_is_said_to_those_who_do_not_see_it(tmp_path: Path) -> None:
    for size in (plots.SCREEN, plots.COLUMN):
        for make in CHARTS.values():
            assert len(make(texts(), size).to_dict()["description"]) > 20


def test_an_unreadable_folder_is_the_callers_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        plots.save(plots.calibration_histogram(EFFECTS), tmp_path / "file", "chart")


def test_file_names_are_safe_and_different_names_stay_different() -> None:
    assert plots.file_name("product_by_scale") == "product_by_scale"
    names = ["a/b", "a b", "../a", "", "..", "日本", "x" * 300, "x" * 301, ODD]
    safe = [plots.file_name(name) for name in names]
    assert len(set(safe)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") for name in safe)
    assert all(name[0] not in ".-" and len(name) < 100 for name in safe)
