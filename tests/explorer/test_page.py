"""The page is one file that says what it holds, stays small, and takes texts for texts."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from saets.cli import main
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.explorer import page as module
from saets.explorer.contents import gather
from saets.explorer.encoding import compressed_size
from saets.explorer.page import most_entries, page, planned_top, texts_of
from saets.explorer.sources import Sources
from saets.run_folder.store import RunFolder
from saets.terminal.progress import Silent
from tests.explorer.conftest import approximator, planted

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"


def held(made: bytes) -> dict[str, str]:
    """The contents of all script elements with an id."""
    return dict(re.findall(r'<script type="text/plain" id="([^"]+)">([^<]*)</script>', made.decode()))


def unpacked(letters: str) -> bytes:
    return gzip.decompress(base64.b64decode(letters))


@pytest.fixture
def made(run: RunFolder, tiny_experiment: Experiment) -> bytes:
    approximator(run)
    sources = Sources.of(tiny_experiment.model_copy(update={"name": HOSTILE}), run)
    return page(sources, gather(sources, 5, Silent()), texts_of(sources, {3: HOSTILE}))


def test_the_page_holds_the_lists_in_half_precision_and_says_their_shapes_and_its_own_size(
    made: bytes, tiny_experiment: Experiment
) -> None:
    data = held(made)
    about = json.loads(data["about"])
    assert about["bytes"] == pytest.approx(len(made), abs=8)
    assert about["lists"]["effects"] == {"rows": 10, "width": 5, "index": "u16", "errors": False}
    assert {f"data-{name}" for name in about["blobs"]} == data.keys() - {"about"}
    _, effects = planted(tiny_experiment)
    values = np.frombuffer(unpacked(data["data-effects.value"]), "<f2").reshape(10, 5)
    index = np.frombuffer(unpacked(data["data-effects.index"]), "<u2").reshape(10, 5)
    ids = json.loads(unpacked(data["data-vectors"]))["id"]
    assert len(ids) == 10
    assert sorted(np.abs(values).max(1).tolist()) == sorted(np.abs(effects).max(1).tolist())
    assert (index < 64).all()


def test_texts_of_others_cannot_end_a_script_or_become_elements(made: bytes) -> None:
    text = made.decode()
    assert HOSTILE not in text
    assert f"<title>{html.escape(HOSTILE)} · effects</title>" in text
    assert json.loads(held(made)["about"])["title"] == HOSTILE
    assert json.loads(unpacked(held(made)["data-labels"])) == {"3": HOSTILE}
    assert text.count("<script") == text.count("</script>") == len(held(made)) + 1


def test_the_policy_lets_run_the_one_program_and_allows_no_request(made: bytes) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', made.decode())
    assert policy
    directives = dict(part.split(" ", 1) for part in policy[1].split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["script-src"].startswith("'sha256-")
    assert not {"connect-src", "font-src", "frame-src"} & directives.keys()
    assert not re.search(r'(src|href)="(?!#|data:)', made.decode())


def test_the_papers_size_has_room_for_the_usual_number_of_entries_and_labels_of_all_features() -> None:
    labels = {"labels": {str(i): f"{i} words about what the feature is for" for i in range(16384)}}
    assert most_entries(16384, 50000, fixed=compressed_size(labels)) > module.USUAL


def test_more_entries_than_a_page_has_room_for_are_refused_and_fewer_kept_where_there_are_many_vectors(
    run: RunFolder, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources.of(tiny_experiment, run)
    assert planned_top(sources, {}, None) == module.USUAL
    with pytest.raises(InputError, match="--top is 0; expected 1 to"):
        planned_top(sources, {}, 0)
    monkeypatch.setattr(module, "MOST_BYTES", 150_000)
    fits = planned_top(sources, {}, None)
    assert 1 < fits < module.USUAL
    with pytest.raises(InputError, match=f"--top is {fits + 1}; expected 1 to {fits}: a page stays below 0.15 MB"):
        planned_top(sources, {}, fits + 1)
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    with pytest.raises(InputError, match="64 features and 10 vectors do not fit"):
        planned_top(sources, {}, None)


def test_a_page_that_turns_out_too_large_is_not_made(
    run: RunFolder, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = Sources.of(tiny_experiment, run)
    contents = gather(sources, 5, Silent())
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="smaller --top than 5"):
        page(sources, contents, texts_of(sources, {}))


def test_an_effect_beyond_half_precision_is_cut_to_its_range() -> None:
    assert np.frombuffer(module.halves(torch.tensor([1e6, -1e6, float("nan")])), "<f2")[:2].tolist() == [65504, -65504]


def files(run: RunFolder) -> dict[str, int]:
    assert run.path.local
    return {str(path): path.stat().st_mtime_ns for path in run.path.local.rglob("*") if path.is_file()}


def test_the_command_writes_the_page_into_the_run_says_its_size_and_changes_nothing_else(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run)
    assert main(["explorer", str(run.path), "--top", "4"]) == 0
    printed = capsys.readouterr().out
    written = Path(str(run.path)) / "explorer.html"
    assert "64 features, 10 vectors; of every list the 4 entries largest in size; 0.1 MB" in printed
    assert "not in it: predictions; no approximator" in printed
    assert files(run) == before | {str(written): written.stat().st_mtime_ns}


def test_the_command_takes_labels_and_another_place_and_refuses_what_it_cannot_use(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"index": "5", "description": "the fifth"}]))
    out = tmp_path / "odd <name> & more.html"
    assert main(["explorer", str(run.path), "--labels", str(labels), "--out", str(out)]) == 0
    assert json.loads(unpacked(held(out.read_bytes())["data-labels"])) == {"5": "the fifth"}
    labels.write_text(json.dumps({"9999": "beyond"}))
    assert main(["explorer", str(run.path), "--labels", str(labels)]) == 2
    labels.write_text("weddings")
    assert main(["explorer", str(run.path), "--labels", str(labels)]) == 2
    assert main(["explorer", "tiny", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "the labels are of features 9999 to 9999, the SAE has 0 to 63" in said
    assert "expected features and labels" in said
    assert "nothing to explore at runs/tiny" in said
