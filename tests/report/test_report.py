"""`saets report`: one page of a finished run, read without Ray, weights or a change to the run folder."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import ray
import torch
from browser import Browser, Page
from measure_report import made_up_experiment, made_up_run

from saets.cli import main
from saets.errors import InputError
from saets.experiment.config import PRESETS, settings_hash
from saets.files.storage import Location
from saets.records import GenerationItem
from saets.report.contents import contents
from saets.report.page import page
from saets.report.tables import tables
from saets.stages.report import findings, write_report
from saets.stages.session import Session

METHODS = ("caa", "sae", "sae_ts")


def small(where: Path | Location, goals: tuple[str, ...] = ("london", "wedding"), **changes: Any) -> Session:
    """A made-up run of two goals, three methods, three scales and four samples."""
    settings = {"methods": METHODS, "scales": (0.0, 40.0, 80.0), "samples": 4}
    chosen = {name: changes.pop(name, value) for name, value in settings.items()}
    return made_up_run(where, made_up_experiment(goals, **chosen), **changes)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return small(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def report(session: Session) -> Path:
    path = write_report(session).local
    assert path is not None
    return path


def told(file: Path) -> dict[str, Any]:
    """What the page was told."""
    found = re.search(r'<script type="application/json" id="contents">(.*?)</script>', file.read_text(encoding="utf-8"), re.S)
    assert found
    page: dict[str, Any] = json.loads(found[1])
    return page | {"texts": {name: column(values) for name, values in page["texts"].items()}}


def column(values: Any) -> list[Any]:
    """The values of a column, which may come as its different values and their places."""
    return values if isinstance(values, list) else [values["of"][at] for at in values["at"]]


def files(folder: Path) -> Mapping[str, str]:
    return {str(path.relative_to(folder)): settings_hash(path.read_bytes().hex()) for path in folder.rglob("*") if path.is_file()}


def shown(page: Page, selector: str) -> list[str]:
    """The text of each element that is to be seen."""
    every = f"[...document.querySelectorAll({json.dumps(selector)})]"
    found: list[str] = page.evaluate(f"{every}.filter((one) => one.checkVisibility()).map((one) => one.innerText)")
    return found


def test_the_command_writes_one_file_and_changes_nothing_else(session: Session, tmp_path: Path) -> None:
    folder = session.run.path.local
    assert folder is not None
    before = files(folder)
    assert main(["report", str(folder), "--out", str(tmp_path / "mine.html")]) == 0
    assert files(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html"]
    assert b"</html>" in (tmp_path / "mine.html").read_bytes()


def test_a_report_starts_no_ray_and_reads_no_weights(session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("not for a report")

    for where, name in ((ray, "init"), (torch.nn.Module, "__init__"), (socket.socket, "connect")):
        monkeypatch.setattr(where, name, refuse)
    assert main(["report", str(session.run.path), "--out", str(tmp_path / "report.html")]) == 0


def test_a_report_of_a_run_in_a_bucket_lies_in_the_bucket(remote: Location) -> None:
    session = small(remote, ("london",), methods=("caa",))
    assert main(["report", str(remote)]) == 0
    assert b"</html>" in (session.run.path / "report.html").read_bytes()


def test_contents_are_what_the_stages_found(session: Session, report: Path) -> None:
    found, page = findings(session), told(report)
    by_place = {(row["goal"], row["method"]): row for row in page["scores"]}
    for row in found.summary.methods.iter_rows(named=True):
        assert by_place[row["goal"], row["method"]]["held_out"] == pytest.approx(row["held_out"])
        assert by_place[row["goal"], row["method"]]["standing"] == row["standing"]
    assert len(page["texts"]["completion"]) == page["texts_in_all"] == 2 * (1 + 3 * 2) * 4
    assert page["settings"] == session.experiment.to_toml()
    assert ["seed", "0"] in page["provenance"]
    assert page["charts"].keys() == {"product", "plane", *(f"criteria-{method}" for method in METHODS)}


def test_a_method_with_options_of_its_own_has_its_name_and_colour(tmp_path: Path) -> None:
    methods = ("sae_ts", "sae_ts:bias_weight=0")
    path = write_report(small(tmp_path / "variants", methods=methods)).local
    assert path is not None
    plain, variant, _ = told(path)["methods"]
    assert (plain["id"], variant["id"]) == methods
    assert (plain["name"], variant["name"]) == ("SAE-TS", "SAE-TS, bias weight 0")
    assert plain["colour"] != variant["colour"]


def test_a_run_without_results_says_which_stage_is_missing(
    session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err
    other = small(tmp_path / "run", ("london",))
    run = other.run.path.local
    assert run is not None
    for folder, stage in (("grades", "saets grade"), ("vectors", "saets vectors"), ("generations", "saets generate")):
        (run / folder).rename(run / "gone")
        assert main(["report", str(run)]) == 2
        assert stage in capsys.readouterr().err
        assert not (run / "report.html").exists()
        (run / "gone").rename(run / folder)


def test_a_damaged_fit_report_is_named(tmp_path: Path) -> None:
    session = small(tmp_path / "run", ("london",), methods=("caa",))
    (tmp_path / "run" / "fit.json").write_text("{")
    with pytest.raises(InputError, match=r"fit\.json is damaged"):
        write_report(session)


def test_texts_that_do_not_fit_into_a_page_are_left_out_evenly(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saets.report.contents.MOST_TEXTS", 30)
    texts = contents(findings(session))["texts"]
    assert sorted(column(texts["sample"])) == [0] * 14 + [1] * 14


def test_tables_tell_what_else_is_known(session: Session) -> None:
    fit = {
        "rows_train": 90,
        "rows_held_out": 10,
        "rows_own": 8,
        "rows_shipped": 92,
        "solver": "ridge",
        "penalty": 0.1,
        "held_out": {"r2": 0.4, "r2_ceiling": 0.6, "cosine": 0.7, "feature_r2": {"features": 0}},
    }
    row = {"goal": "london", "method": "caa", "scale": 40.0, "perplexity": 20.0, "unsteered_perplexity": 18.0, "target": 0.5}
    disturbed = pl.DataFrame([{**row, "others": 0.25, "noise": 0.1, "largest": 7, "largest_effect": -0.5}])
    failures = pl.DataFrame({"vector_id": ["ab"], "source": ["decoder"], "index": [4], "reason": ["not finite"]})
    found = tables(replace(findings(session), fit=fit, side_effects=disturbed, failures=failures))
    assert found.keys() == {"differences", "scales", "fit", "side-effects", "failed-vectors"}
    assert found["side-effects"]["rows"][0]["cells"][3:] == ["20.0 (18.0)", "+0.500", "0.250 ± 0.100", "7: -0.500"]
    assert ["R2 of held-out rows", "0.400"] in [row["cells"] for row in found["fit"]["rows"]]
    assert found["failed-vectors"]["rows"][0]["cells"] == ["ab", "decoder", "4", "not finite"]


def test_a_choice_is_followed_by_the_whole_page(browser: Browser, report: Path) -> None:
    with browser.page(report) as page:
        page.wait_for("document.documentElement.dataset.drawn")
        assert page.evaluate("document.title") == "tiny: what steering did"
        assert len(shown(page, "#charts svg.marks")) == 3
        assert browser.colours(page.screenshot()) > 50
        page.evaluate("document.querySelector('#goal').focus()")
        page.press("ArrowDown", "ArrowDown")
        assert page.wait_for("location.hash === '#goal=wedding'")
        page.click(".matrix tr:nth-child(2) td:nth-child(4) button")
        assert page.wait_for("location.hash === '#goal=wedding&method=sae_ts'")
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
        cards = shown(page, "#texts .about")
        assert len(cards) == 4
        assert all("SAE-TS" in card and "wedding" in card for card in cards)
        assert all("wedding" in row and "SAE-TS" in row for row in shown(page, "[data-table=scales] tbody tr"))
        panels = "[...document.querySelectorAll('#charts figure')].map((one) => one.querySelector('svg.marks').textContent)"
        assert page.wait_for(f"{panels}.every((said) => said.includes('wedding') && !said.includes('london'))")


def test_texts_are_found_by_their_words_and_the_address_keeps_the_choice(browser: Browser, report: Path) -> None:
    texts = told(report)["texts"]["completion"]
    word = next(word for word in texts[0].split() if len(word) > 4)
    with browser.page(report) as page:
        page.evaluate("document.querySelector('#search').focus()")
        page.write(word.upper())
        address = page.wait_for("location.hash.includes('find') && location.hash")
        count = int(shown(page, "#count")[0].split()[2])
        assert 0 < count < len(texts)
        assert all(word in text.lower() for text in shown(page, "#texts .words"))
        assert set(mark.lower() for mark in shown(page, "#texts .words mark")) == {word}
    with browser.page(report, hash=f"{address[1:]}&scale=&order=best") as page:
        assert page.evaluate("[document.querySelector('#search').value, document.querySelector('#scale').value]") == [
            word.upper(),
            "",
        ]
        found = int(shown(page, "#count")[0].split()[2])
        assert found == sum(word in text.lower() for text in texts)
        scores = [float(text.split("\n")[-1]) for text in shown(page, "#texts .grades div:nth-child(3)")]
        assert scores == sorted(scores, reverse=True)


def test_an_address_of_another_run_chooses_nothing(browser: Browser, report: Path) -> None:
    with browser.page(report, hash="goal=elsewhere&method=none&scale=7&order=odd&main") as page:
        values = "[...document.querySelectorAll('select')].map((one) => one.value)"
        assert page.evaluate(values) == ["", "", "best", ""]


def test_the_page_can_be_used_by_keyboard_and_read_by_a_screen_reader(browser: Browser, report: Path) -> None:
    with browser.page(report, hash="goal=london") as page:
        page.wait_for("document.documentElement.dataset.drawn")
        page.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
        page.press("Enter")
        assert page.wait_for("document.activeElement.id") == "scores"
        assert page.evaluate("location.hash") == "#goal=london"
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        unnamed = "[...document.querySelectorAll('select, input')].filter((one) => !one.labels.length).length"
        assert page.evaluate(unnamed) == 0
        assert page.evaluate("document.documentElement.lang") == "en"
        described = "[...document.querySelectorAll('#charts [role=graphics-document]')].map((one) => one.ariaLabel)"
        assert ["london" in said for said in page.evaluate(described)] == [True] * 3
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("look", "size"), [({"dark": True}, (1280, 900)), ({"print": True}, (900, 900)), ({}, (360, 800))])
def test_the_page_is_not_blank_in_the_dark_on_paper_or_on_a_telephone(
    browser: Browser, report: Path, look: dict[str, bool], size: tuple[int, int]
) -> None:
    with browser.page(report, size=size, **look) as page:
        page.wait_for("document.documentElement.dataset.drawn")
        assert browser.colours(page.screenshot()) > 50
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


HOSTILE = (
    '<img src=x onerror="document.title=1"><script>document.title=2</script></script><!-- <svg onload=alert(3)> '
    "{{contents}} \\u003c &lt; \u2028 ${1} \x07"
)


def test_what_models_and_judges_say_is_text_and_nothing_else(browser: Browser, tmp_path: Path) -> None:
    packaged = (PRESETS / "goals" / "london.toml").read_text()
    goal = tmp_path / 'odd <img src=x onerror="document.title=4"> & name.toml'
    goal.write_text(packaged.replace("The text is about", f"{HOSTILE[:60].replace(chr(34), chr(39))} The text is about", 1))

    def some_fail(item: GenerationItem, criterion: str) -> float | None:
        return None if item.sample == 1 else 0.5

    odd = {"methods": ("caa",), "completion": lambda item: HOSTILE, "score": some_fail, "reply": HOSTILE}
    file = write_report(small(tmp_path / "run", (str(goal), "wedding"), **odd)).local
    assert file is not None
    with browser.page(file, hash="scale=&find=" + "onerror") as page:
        page.wait_for("document.documentElement.dataset.drawn")
        assert page.evaluate("document.title") == "tiny: what steering did"
        assert page.evaluate("document.querySelectorAll('img, main script, iframe, object').length") == 0
        cards = page.evaluate("[...document.querySelectorAll('#texts .words')].map((one) => one.textContent)")
        assert cards
        assert all(card.endswith(HOSTILE) for card in cards)
        assert goal.stem in page.evaluate("document.querySelector('.matrix').textContent")
        assert HOSTILE in page.evaluate("document.querySelector('[data-table=failed-texts]').textContent")


def test_letters_that_no_text_may_hold_are_kept_out_of_harms_way(browser: Browser, session: Session, tmp_path: Path) -> None:
    told = contents(findings(session))
    told["texts"]["completion"] = ["\x00 \ud800 \udfff </script><!--"] * len(told["texts"]["sample"])
    told["description"] = "\x00</title><script>document.title=1</script>\ud800"
    (tmp_path / "odd.html").write_bytes(page(told))
    with browser.page(tmp_path / "odd.html") as opened:
        opened.wait_for("document.documentElement.dataset.drawn")
        assert opened.evaluate("document.title") == "tiny: what steering did"
        words = opened.evaluate("document.querySelector('#texts .words').lastChild.textContent.length")
        assert words == len("\x00 \ud800 \udfff </script><!--")


def test_even_a_program_that_got_into_the_page_would_not_run(browser: Browser, report: Path, tmp_path: Path) -> None:
    broken = report.read_text(encoding="utf-8").replace("<main>", "<main><script>document.title = 'run'</script>")
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    with pytest.raises(Exception, match="Content Security Policy"), browser.page(tmp_path / "broken.html") as page:
        assert page.evaluate("document.title") == "tiny: what steering did"


@pytest.mark.parametrize(
    "changes",
    [
        {"scales": (40.0,)},
        {"samples": 1},
        {"methods": ("caa",), "scales": (0.0,)},
        {"score": lambda item, criterion: None, "reply": "HTTP 500"},
    ],
    ids=["one scale", "one sample", "unsteered alone", "all failed"],
)
def test_a_page_of_little_or_nothing_opens(browser: Browser, tmp_path: Path, changes: dict[str, Any]) -> None:
    file = write_report(small(tmp_path / "run", ("london",), **changes)).local
    assert file is not None
    with browser.page(file) as page:
        page.wait_for("document.documentElement.dataset.drawn")
        assert shown(page, "#matrix button")
        if "reply" in changes:
            assert shown(page, "[data-table=failed-texts] tbody tr")[0].endswith("CAA\tHTTP 500\t8")
            assert not shown(page, "#charts figure")
            page.evaluate("location.hash = 'scale=failed'")
            assert page.wait_for("document.querySelectorAll('#texts .failed').length") > 0
