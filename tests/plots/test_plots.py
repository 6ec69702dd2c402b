"""Charts: what they show, how they are told apart, and files that open anywhere."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import altair as alt
import numpy as np
import polars as pl
import pytest

from saets import plots
from saets.errors import InputError
from saets.scores.results import results_table
from saets.scores.summary import summary_table

ODD = 'odd </script><script>alert("1")</script> | & goal/with\\slashes'


def texts(goals: tuple[str, ...] = ("london", ODD), prompts: tuple[str, ...] = ("I think",), samples: int = 6) -> pl.DataFrame:
    """Texts of two methods at three scales and unsteered, with random scores."""
    rng = np.random.default_rng(0)
    cells = [("unsteered", 0.0), *((method, scale) for method in ("caa", "sae_ts") for scale in (40.0, 80.0, 120.0))]
    keys = ("goal", "prompt", "method", "scale", "sample")
    rows = [(goal, prompt, *cell, sample) for goal in goals for prompt in prompts for cell in cells for sample in range(samples)]
    scores = {name: rng.random(len(rows)) for name in ("behaviour", "coherence")}
    product = pl.col("behaviour") * pl.col("coherence")
    return pl.DataFrame(rows, schema=keys, orient="row").with_columns(**scores, failed=False).with_columns(product=product)


def failed(frame: pl.DataFrame) -> pl.DataFrame:
    """The same texts, none of them graded."""
    scores = pl.col("behaviour", "coherence", "product")
    return frame.with_columns(pl.when(False).then(scores).name.keep(), failed=True)


EFFECTS = pl.DataFrame(
    {"scale": [10.0 + i % 90 for i in range(6000)] + [200.0] * 500, "calibration": ["ok"] * 6000 + ["capped"] * 500}
)

CHARTS: dict[str, Callable[[pl.DataFrame], plots.Plot]] = {
    "product by scale": lambda frame: plots.product_by_scale(results_table(frame)),
    "criteria by scale": lambda frame: plots.criteria_by_scale(results_table(frame), ODD, "sae_ts"),
    "coherence and behaviour": lambda frame: plots.coherence_behaviour(results_table(frame)),
    "score bars": lambda frame: plots.score_bars(summary_table(frame)),
    "calibration": lambda _: plots.calibration_histogram(EFFECTS),
}


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


def rows(chart: plots.Plot) -> list[dict[str, Any]]:
    """The data of a chart."""
    (data,) = chart.to_dict()["datasets"].values()
    return list(data)


def png_bytes(path: Path) -> tuple[int, int, bytes]:
    """Width, height and the filtered scan lines of an 8-bit RGBA picture, its checksums proven."""
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
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    lines = zlib.decompress(chunks[b"IDAT"])
    assert (depth, colour, len(lines)) == (8, 6, height * (1 + 4 * width))
    return width, height, lines


@pytest.mark.parametrize("name", CHARTS)
def test_a_saved_chart_opens_without_a_network(name: str, tmp_path: Path) -> None:
    html, svg, png = plots.save(CHARTS[name](texts()), tmp_path / "plots", name)
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


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("frame", [texts(samples=1), failed(texts())], ids=["one sample", "all failed"])
def test_a_chart_of_little_or_nothing_still_draws(name: str, frame: pl.DataFrame) -> None:
    assert CHARTS[name](frame).to_dict()["$schema"].startswith("https://vega.github.io/schema/vega-lite")


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


def test_no_two_methods_look_alike_in_colour_or_in_grey() -> None:
    looks = plots.METHODS.values()
    assert len(set(plots.display_names().values())) == len({look.colour for look in looks}) == len(looks)
    assert len({look.shape for look in looks}) == len(looks)
    assert len({plots.METHODS[method].dash for method in ("caa", "sae", "sae_ts")}) == 3


def test_a_method_has_the_same_colour_whatever_else_is_drawn() -> None:
    both, alone = results_table(texts()), results_table(texts().filter(pl.col("method") == "sae_ts"))
    for results in (both, alone):
        scale = plots.product_by_scale(results).to_dict()["spec"]["layer"][0]["encoding"]["color"]["scale"]
        assert dict(zip(scale["domain"], scale["range"], strict=True))["SAE-TS"] == plots.METHODS["sae_ts"].colour


def test_panels_are_goals_and_where_there_are_several_prompts_goals_and_prompts() -> None:
    one = rows(plots.product_by_scale(results_table(texts())))
    assert {row["panel"] for row in one} == {"london", ODD}
    two = rows(plots.product_by_scale(results_table(texts(("london",), ("I think", "")))))
    assert {row["panel"] for row in two} == {"london, “I think”", "london, no prompt"}


def test_every_line_starts_at_the_unsteered_texts() -> None:
    drawn = [row for row in rows(plots.product_by_scale(results_table(texts()))) if row["scale"] == 0 and row["goal"] == "london"]
    assert [row["series"] for row in drawn] == ["CAA", "SAE-TS"]
    assert len({row["product"] for row in drawn}) == 1


def test_the_criteria_are_drawn_as_they_stand_in_the_results() -> None:
    results = results_table(texts())
    drawn = pl.DataFrame(rows(plots.criteria_by_scale(results, "london", "caa")))
    expected = results.filter((pl.col("goal") == "london") & (pl.col("method") == "caa"))
    for series, column in (("behaviour", "behaviour"), ("coherence", "coherence"), ("behaviour × coherence", "product")):
        assert drawn.filter(pl.col("series") == series)["value"].to_list() == expected[column].to_list()


def test_arrowheads_point_to_the_larger_scale() -> None:
    means = [(0.1, 0.9), (0.5, 0.9), (0.5, 0.5)]
    columns = {"goal": "london", "method": "caa", "prompt": "", "failed": False, "product": 0.0}
    frame = pl.concat(
        pl.DataFrame({"scale": [20.0 * i], "sample": [0], "behaviour": [y], "coherence": [x]}) for i, (y, x) in enumerate(means)
    ).with_columns(**{name: pl.lit(value) for name, value in columns.items()})
    up, left, last = rows(plots.coherence_behaviour(results_table(frame)))
    assert up["angle"] == pytest.approx(0)
    assert (up["middle_behaviour"], up["middle_coherence"]) == (pytest.approx(0.3), pytest.approx(0.9))
    assert left["angle"] == pytest.approx(-90)
    assert (left["middle_behaviour"], left["middle_coherence"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert last["middle_behaviour"] is None


def test_the_histogram_counts_every_vector_once() -> None:
    drawn = pl.DataFrame(rows(plots.calibration_histogram(EFFECTS)))
    counts = dict(drawn.group_by("outcome").agg(pl.col("vectors").sum()).iter_rows())
    assert counts == {"ok (6,000)": 6000, "capped (500)": 500}
    assert drawn.filter(pl.col("outcome") == "capped (500)").select("high", "vectors").rows() == [(200.0, 500)]


@pytest.mark.parametrize("scale", [0.0, 80.0])
def test_the_histogram_of_one_scale_is_one_bar(scale: float) -> None:
    effects = pl.DataFrame({"scale": [scale] * 5, "calibration": ["fixed"] * 5})
    (bar,) = rows(plots.calibration_histogram(effects))
    assert bar["vectors"] == 5
    assert bar["low"] <= scale <= bar["high"]


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    results = results_table(texts())
    with pytest.raises(InputError, match="unknown goal 'lodon'.*did you mean 'london'"):
        plots.criteria_by_scale(results, "lodon", "caa")
    with pytest.raises(InputError, match="unknown method 'sae'; known: caa, sae_ts"):
        plots.criteria_by_scale(results, "london", "sae")
    with pytest.raises(InputError, match="unknown method 'mine'"):
        plots.product_by_scale(results.with_columns(pl.lit("mine").alias("method")))
    with pytest.raises(InputError, match="no results to plot"):
        plots.product_by_scale(results.clear())
    with pytest.raises(InputError, match="no effects to plot"):
        plots.calibration_histogram(EFFECTS.clear())
