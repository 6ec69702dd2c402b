"""The page in a browser, with keys alone: found, shown, linked, and nothing in it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, Page

from saets.experiment.config import Experiment
from saets.explorer.contents import gather
from saets.explorer.page import page, texts_of
from saets.explorer.sources import Sources
from saets.run_folder.store import RunFolder
from saets.terminal.progress import Silent
from saets.vector.vector import SteeringVector
from tests.explorer.conftest import MEASURED, approximator, planted
from tests.explorer.test_page import HOSTILE

LABELS = {3: "quotation marks", 5: "weddings & <i>marriages</i>", 7: HOSTILE, 9: "wedding cakes"}
READY = "document.body.dataset.ready"


@pytest.fixture
def file(run: RunFolder, tiny_experiment: Experiment, tmp_path: Path) -> Path:
    """The page of the small run, all of whose names are odd."""
    approximator(run)
    goal = SteeringVector.from_tensor(torch.ones(32), tiny_experiment.hook_name)
    goal.save(run.vector("<b>goal", "sae_ts"))
    sources = Sources.of(tiny_experiment.model_copy(update={"name": HOSTILE}), run)
    (tmp_path / "explorer.html").write_bytes(page(sources, gather(sources, 8, Silent()), texts_of(sources, LABELS)))
    return tmp_path / "explorer.html"


@pytest.fixture
def opened(browser: Browser, file: Path) -> Iterator[Page]:
    with browser.page(file) as page:
        page.wait_for(READY)
        yield page


def text(page: Page, selector: str) -> str:
    return str(page.evaluate(f"document.querySelector({selector!r}).textContent"))


def at(page: Page, hash: str) -> None:
    """Go where a link would, and wait until that is shown."""
    page.evaluate(f"location.hash = {hash!r}")
    page.wait_for(f"document.body.dataset.shown === {hash!r}")


def values(page: Page, title: str) -> list[tuple[str, str]]:
    """Ids and figures of the list with this title."""
    rows = page.evaluate(
        f"[...document.querySelectorAll('section')].filter((one) => one.querySelector('h2').textContent === {title!r})"
        ".flatMap((one) => [...one.querySelectorAll('.list li')])"
        ".map((row) => [row.querySelector('.id').textContent, row.querySelector('.value').firstChild.textContent])"
    )
    return [(row[0], row[1].replace("−", "-")) for row in rows]


def test_a_search_with_keys_alone_finds_a_feature_by_its_label_and_the_back_button_returns(opened: Page) -> None:
    opened.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', { key: '/', bubbles: true }))")
    assert opened.evaluate("document.activeElement.id") == "query"
    opened.write("wedd")
    opened.wait_for("document.querySelectorAll('#found [role=option]').length === 2")
    assert opened.evaluate("document.querySelector('#query').getAttribute('aria-expanded')") == "true"
    opened.press("ArrowDown")
    active = opened.evaluate("document.querySelector('#query').getAttribute('aria-activedescendant')")
    assert opened.evaluate("document.querySelector('[aria-selected=true]').id") == active
    assert text(opened, "#counted") == "2 found"
    opened.press("Enter")
    opened.wait_for("document.querySelector('h1').textContent.startsWith('Feature 9')")
    assert opened.evaluate("location.hash").startswith("#feature=9")
    assert opened.evaluate("document.activeElement.id") == "main"
    assert text(opened, "h1") == "Feature 9wedding cakes"
    opened.evaluate("history.back()")
    opened.wait_for("document.querySelector('h1').textContent === 'Search'")
    assert "2 found for “wedd”" in text(opened, "main")


def test_a_number_finds_its_feature_first_and_escape_closes_what_was_found(opened: Page) -> None:
    opened.evaluate("document.querySelector('#query').focus()")
    opened.write("40")
    opened.wait_for("document.querySelector('#found [aria-selected=true]') !== null")
    assert text(opened, "#found [aria-selected=true] b") == "40"
    opened.press("Escape")
    assert opened.evaluate("document.querySelector('#found').hidden")
    opened.press("Enter")
    opened.press("Enter")
    opened.wait_for("document.querySelector('h1').textContent === 'Feature 40'")


def test_a_features_page_shows_what_was_measured_and_predicted_strongest_first(opened: Page, tiny_experiment: Experiment) -> None:
    _, effects = planted(tiny_experiment)
    at(opened, "#feature=5")
    effect = effects[MEASURED.index(5)]
    order = np.argsort(-np.abs(effect), kind="stable")[:8]
    shown = [(int(id), float(value)) for id, value in values(opened, "What it does")]
    assert [value for _, value in shown] == pytest.approx([effect[id] for id, _ in shown], abs=0.006)
    assert [abs(value) for _, value in shown] == pytest.approx(np.abs(effect[order]).tolist(), abs=0.006)
    assert len(values(opened, "What it should do")) == len(values(opened, "What causes it")) == 8
    assert len(values(opened, "Decoder rows alike")) == 8
    facts = text(opened, ".facts")
    assert "Scale14.5calibrated" in facts
    assert "Effect on itself" in facts
    assert opened.evaluate("document.title").startswith("Feature 5 · ")


def test_raised_and_lowered_effects_can_be_chosen_and_the_address_says_so(opened: Page, file: Path) -> None:
    at(opened, "#feature=5")
    both = values(opened, "What it does")
    opened.click("input[value=down]")
    opened.wait_for("location.hash.includes('sign=down')")
    opened.wait_for("document.activeElement.value === 'down'")
    lowered = values(opened, "What it does")
    assert lowered == [(id, value) for id, value in both if value.startswith("-")]
    assert 0 < len(lowered) < 8
    opened.evaluate("history.back()")
    opened.wait_for("document.querySelector('input[value=all]').checked")


def test_an_address_shows_what_it_names_at_once(browser: Browser, file: Path) -> None:
    with browser.page(file, hash="feature=5&sign=up") as page:
        page.wait_for(READY)
        assert page.evaluate("document.querySelector('input[value=up]').checked")
        assert text(page, "h1").startswith("Feature 5")
    with browser.page(file, hash="find=wedding") as page:
        page.wait_for(READY)
        assert "2 found" in text(page, "main")
        assert page.evaluate("document.querySelector('#query').value") == "wedding"
    for wrong in ("feature=64", "feature=%3Cimg%20src=x%3E", "vector=none"):
        with browser.page(file, hash=wrong) as page:
            page.wait_for(READY)
            assert text(page, "h1") == "Not found"
            assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_a_vector_is_shown_with_its_name_and_a_link_leads_on_to_features(opened: Page) -> None:
    opened.evaluate("document.querySelector('#query').focus()")
    opened.write("goal")
    opened.wait_for("document.querySelector('#found [role=option]') !== null")
    opened.press("Enter")
    opened.wait_for("document.querySelector('h1').textContent.includes('goal')")
    assert text(opened, "h1") == "<b>goal · SAE-TS"
    assert "not measured" in text(opened, "main")
    first = values(opened, "What it should do")[0][0]
    opened.evaluate("[...document.querySelectorAll('.list a')][0].focus()")
    opened.press("Enter")
    opened.wait_for(f"document.querySelector('h1').textContent.startsWith('Feature {first}')")


def test_html_in_names_labels_and_sources_is_shown_as_text_and_never_runs(opened: Page) -> None:
    at(opened, "#feature=7")
    assert HOSTILE in text(opened, "h1")
    opened.evaluate("document.querySelector('#query').focus()")
    opened.write("onerror")
    opened.wait_for("document.querySelector('#found [role=option]') !== null")
    assert HOSTILE in text(opened, "#found")
    assert "hacked" not in opened.evaluate("document.title").replace(HOSTILE, "")
    assert opened.evaluate("document.querySelectorAll('img, i:not([class]), main script').length") == 0
    assert text(opened, "#home") == HOSTILE


def test_the_policy_stops_a_program_that_is_put_in_and_a_request(opened: Page) -> None:
    put_in = "const made = document.createElement('script'); made.textContent = 'window.ran = true'; document.body.append(made);"
    opened.evaluate(f"(() => {{ {put_in} }})()")
    assert opened.evaluate("window.ran === undefined")
    refused = opened.evaluate("fetch('data:text/plain,x').then(() => false, () => true)")
    assert refused
    assert all("Content Security Policy" in one or "violates" in one for one in opened.problems)
    opened.problems.clear()


def test_the_start_says_what_is_in_the_page_how_much_was_kept_and_what_is_not_there(opened: Page) -> None:
    said = text(opened, "main")
    assert "10 measured here; 1 of the run's own, not measured" in said
    assert "of every list the 8 entries largest in size" in said
    assert "No cards" in said
    assert "This file: 0.1 MB" in text(opened, "#foot")
    assert opened.evaluate("document.documentElement.lang") == "en"
    assert opened.evaluate("document.querySelectorAll('h1').length") == 1
    at(opened, "#feature=5")
    assert "this SAE comes without contexts" in text(opened, "main")


@pytest.mark.parametrize(("dark", "size"), [(False, (1400, 900)), (True, (390, 800))])
def test_a_picture_of_it_is_not_blank_and_a_narrow_window_does_not_scroll_sideways(
    browser: Browser, file: Path, dark: bool, size: tuple[int, int]
) -> None:
    with browser.page(file, hash="feature=5", dark=dark, size=size) as page:
        page.wait_for(READY)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        picture = page.screenshot()
    assert browser.colours(picture) > 50
