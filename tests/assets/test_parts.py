"""Parts of a build are made once, remade where something they depend on changed, and never begun without room."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from assets.parts import Build, Need, Part, whole
from assets.settings import Settings

from saets.errors import InputError


class Workshop:
    """Three parts in a row, beside one that stands alone, and which of them were made."""

    def __init__(self, work: Path, need: Need | None = None) -> None:
        self.work, self.made = work, list[str]()
        self.parts = {
            "text": self.part("text", "writing"),
            "streams": self.part("streams", "residuals", after=("text",)),
            "sae": Part(self.making("sae"), ("training",), ("streams",), need=lambda _: need or Need()),
            "apart": self.part("apart", "passages"),
        }

    def part(self, name: str, section: str, after: tuple[str, ...] = ()) -> Part:
        return Part(self.making(name), (section,), after)

    def making(self, name: str) -> Any:
        def make(build: Build, folder: Path) -> Mapping[str, Any]:
            self.made.append(name)
            if name in self.broken:
                raise InputError("stopped")
            return {"folder": folder.name}

        return make

    broken: tuple[str, ...] = ()

    def build(self, *names: str, **settings: str) -> list[str]:
        self.made.clear()
        changed = Settings().replaced([f"{key.replace('__', '.')}={value}" for key, value in settings.items()])
        Build(self.work, changed, self.parts).make(names or list(self.parts))
        return list(self.made)


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "work")


def test_a_part_is_made_once_and_after_what_it_needs(workshop: Workshop) -> None:
    assert workshop.build("sae") == ["text", "streams", "sae"]
    assert workshop.build() == ["apart"]
    assert workshop.build() == []


def test_what_a_part_was_made_of_may_be_gone(workshop: Workshop) -> None:
    workshop.build("sae")
    (streams,) = workshop.work.glob("streams-*")
    shutil.rmtree(streams)
    assert workshop.build("sae") == []
    assert workshop.build("streams", "sae") == ["streams"]


def test_a_changed_setting_remakes_what_depends_on_it_and_one_changed_back_nothing(workshop: Workshop) -> None:
    workshop.build()
    assert workshop.build(training__k="16") == ["sae"]
    assert workshop.build(writing__tokens="1000") == ["text", "streams", "sae"]
    assert workshop.build(passages__tokens="1000") == ["apart"]
    assert workshop.build() == []


def test_a_part_that_was_stopped_is_gone_on_with_in_its_own_folder(workshop: Workshop) -> None:
    workshop.broken = ("streams",)
    with pytest.raises(InputError, match="stopped"):
        workshop.build("sae")
    (runs,) = workshop.work.glob("streams-*/runs.json")
    begun = {path.name for path in workshop.work.iterdir()}
    workshop.broken = ()
    assert workshop.build("sae") == ["streams", "sae"]
    assert begun <= {path.name for path in workshop.work.iterdir()}
    assert len(json.loads(runs.read_text())) == 2


def test_the_time_that_a_part_has_taken_is_there_after_a_kill(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed leaves what was on disk while it worked."""
    monkeypatch.setattr("assets.parts.RECORD_SECONDS", 0.01)

    def make(build: Build, folder: Path) -> Mapping[str, Any]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            (run,) = json.loads((folder / "runs.json").read_text())
            if run["seconds"] >= 0.2:
                return {"left": run}
        raise AssertionError("the time was not written again")

    workshop.parts["apart"] = Part(make, ("passages",))
    workshop.build("apart")
    (made,) = workshop.work.glob("apart-*/made.json")
    kept = json.loads(made.read_text())
    (whole_run,) = kept["runs"]
    assert kept["left"].keys() == whole_run.keys()
    assert kept["left"]["seconds"] <= whole_run["seconds"]


def test_what_is_kept_of_a_part_are_its_settings_the_machine_and_its_facts(workshop: Workshop) -> None:
    workshop.build("streams")
    (made,) = workshop.work.glob("streams-*/made.json")
    kept = json.loads(made.read_text())
    assert kept["settings"]["residuals"]["layers"] == [12, 15, 18]
    assert kept["folder"] == made.parent.name
    assert [run.keys() for run in kept["runs"]] == [{"date", "machine", "seconds"}]


@pytest.mark.parametrize(("need", "said"), [(Need(disk=1e18), "GB of disk"), (Need(memory=1e18), "GB of memory")])
def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, need: Need, said: str) -> None:
    workshop = Workshop(tmp_path / "work", need)
    with pytest.raises(InputError, match=said):
        workshop.build("sae")
    assert workshop.made == []


def test_what_changes_how_and_not_what_remakes_nothing(workshop: Workshop) -> None:
    workshop.parts["effects"] = Part(workshop.making("effects"), ("effects",))
    assert workshop.build("effects") == ["effects"]
    assert workshop.build("effects", effects__rows="8192") == []
    assert workshop.build("effects", effects__random="5") == ["effects"]


def test_a_part_whose_result_lies_elsewhere_is_made_each_time(workshop: Workshop) -> None:
    workshop.parts["ship"] = Part(workshop.making("ship"), (), ("apart",), each_time=True)
    assert workshop.build("ship") == ["apart", "ship"]
    assert workshop.build("ship") == ["ship"]


def test_what_a_part_needs_is_looked_for_before_any_is_made(workshop: Workshop) -> None:
    def gone(build: Build) -> None:
        raise InputError("no dictionary")

    workshop.parts["apart"] = Part(workshop.making("apart"), ("passages",), check=gone)
    with pytest.raises(InputError, match="no dictionary"):
        workshop.build()
    assert workshop.made == []


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    def stopped(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "file", stopped)
    assert not (tmp_path / "file").exists()
    whole(tmp_path / "file", lambda path: path.write_text("all"))
    assert (tmp_path / "file").read_text() == "all"


def test_changes_are_what_makes_settings_of_the_defaults() -> None:
    changes = ["passages.skip=['gcide', 'wordnet']", "effects.decoder=4096", "compare.tokens=7"]
    settings = Settings().replaced(changes)
    assert sorted(settings.changes()) == sorted(changes)
    assert Settings().replaced(settings.changes()) == settings
    assert Settings().replaced(["effects.rows=3"]).changes() == [], "which changes how, not what"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("training.depth=3", "unknown key of training 'depth'"),
        ("trainings.k=3", "unknown section 'trainings'"),
        ("training.k=many", "training.k=many"),
        ("training.k", "expected section.key=value"),
    ],
)
def test_a_setting_that_is_none_is_named(assignment: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Settings().replaced([assignment])
