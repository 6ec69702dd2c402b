"""The browser that tests pages: it sees what a person would, and tells when a page fails or asks for something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browser import Browser, PageError

PAGE = """<!doctype html><html lang="en"><title>A page</title><button>first</button><input id="box">
<script>
document.querySelector("button").onclick = () => { document.title = "pressed"; };
</script>"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "odd name #1 ü.html"
    file.write_text(PAGE)
    return file


def test_a_page_is_used_by_keyboard_and_mouse(browser: Browser, file: Path) -> None:
    with browser.page(file, hash="goal=1") as page:
        assert page.evaluate("[document.title, location.hash]") == ["A page", "#goal=1"]
        page.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "first"
        page.press("Enter")
        assert page.wait_for("document.title === 'pressed'") is True
        assert page.wait_for("document.querySelector('#box')") is True
        page.click("#box")
        page.write("ünï </script>")
        assert page.evaluate("document.querySelector('#box').value") == "ünï </script>"


def test_a_page_is_seen_as_light_or_dark_or_printed_and_at_any_size(browser: Browser, file: Path) -> None:
    seen = "[innerWidth, matchMedia('(prefers-color-scheme: dark)').matches, matchMedia('print').matches]"
    with browser.page(file) as page:
        assert page.evaluate(seen) == [1280, False, False]
        page.resize(360, 700)
        assert page.evaluate("innerWidth") == 360
    with browser.page(file, dark=True, size=(800, 600)) as page:
        assert page.evaluate(seen) == [800, True, False]
    with browser.page(file, print=True) as page:
        assert page.evaluate(seen)[2] is True


def test_a_blank_picture_has_one_colour(browser: Browser, file: Path, tmp_path: Path) -> None:
    with browser.page(file) as page:
        assert browser.colours(page.screenshot()) > 10
        assert browser.colours(page.screenshot(full=True)) > 10
    (tmp_path / "blank.html").write_text("<!doctype html><title>nothing</title>")
    with browser.page(tmp_path / "blank.html") as page:
        assert browser.colours(page.screenshot()) == 1


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("throw new Error('broken')", "exception: Error: broken"),
        ("console.error('said', 3)", "console: said 3"),
        ("Promise.reject(new Error('later'))", "exception: Error: later"),
        ("new Image().src = 'https://example.org/x.png'", "request: https://example.org/x.png"),
        ("new Image().src = 'beside.png'", "request: file:///.*beside.png"),
        ("fetch('http://127.0.0.1:9/').catch(() => 0)", "request: http://127.0.0.1:9/"),
        ("new WebSocket('ws://127.0.0.1:9/')", "request: ws://127.0.0.1:9/"),
    ],
)
def test_what_a_page_does_wrong_is_told(browser: Browser, tmp_path: Path, script: str, problem: str) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><title>x</title><script>{script}</script>")
    with pytest.raises(PageError, match=problem), browser.page(tmp_path / "page.html"):
        pass


def test_a_blocked_request_is_told_too(browser: Browser, tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    (tmp_path / "page.html").write_text(f"<!doctype html>{policy}<title>x</title><img src='https://example.org/x.png'>")
    with pytest.raises(PageError, match="Content Security Policy"), browser.page(tmp_path / "page.html"):
        pass


def test_a_browser_that_is_left_is_gone_with_its_folder(browser: Browser) -> None:
    with Browser(browser.program) as other:
        process, profile = other.process, other.profile
        assert other.send("Browser.getVersion")["product"]
        assert Path(profile).is_dir()
    assert not Path(profile).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert browser.send("Browser.getVersion")["product"], "the other one lives on"
