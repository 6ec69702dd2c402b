"""Shards that appear whole or not at all, and a run folder that refuses what does not belong to it."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow.fs import FileSystem

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.files.storage import Location, Where, locate
from saets.run_folder.store import Appender, RunFolder, Table, differing_keys, read_shard

SETTINGS = {"seed": 0, "effects": {"length": 16, "prompts": ["", "I think"]}}

HOLD = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
"""What another process does that writes a run folder."""


def rows(**values: object) -> pa.Table:
    """One row for each text of `key`, with equal `value`s."""
    keys = list(values)
    return pa.table({"key": keys, "value": [values[key] for key in keys]})


def names(folder: Where) -> list[str]:
    return list(locate(folder).entries())


@pytest.fixture
def table(place: Location) -> Table:
    return Table(place / "rows", ["key"])


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file can grow beyond 4 KiB while this holds, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_table_that_was_never_written_has_no_rows_and_no_folder(table: Table) -> None:
    assert table.read() is None
    assert table.ids() == set()
    assert table.shards() == []
    assert not table.folder.is_folder()


def test_what_is_written_is_read_back_sorted_by_key(table: Table) -> None:
    table.write(rows(c=3, a=1))
    table.write(rows(b=2))
    found = table.read()
    assert found is not None
    assert found.to_dict(as_series=False) == {"key": ["a", "b", "c"], "value": [1, 2, 3]}
    assert table.ids() == {"a", "b", "c"}
    assert len(table.shards()) == 2
    some = table.read(["key"])
    assert some is not None
    assert some.columns == ["key"]


def test_the_newest_row_of_a_key_wins(table: Table) -> None:
    for value in range(5):
        table.write(rows(a=value, **{f"only {value}": value}))
    found = table.read()
    assert found is not None
    assert found.filter(pl.col("key") == "a")["value"].to_list() == [4]
    assert len(found) == 6


def test_a_key_of_two_columns_tells_rows_apart_by_both(place: Location) -> None:
    table = Table(place / "grades", ["text", "criterion"])
    table.write(pa.table({"text": ["a", "a"], "criterion": ["x", "y"], "score": [0.1, 0.2]}))
    table.write(pa.table({"text": ["b", "a"], "criterion": ["x", "y"], "score": [0.3, 0.4]}))
    assert table.ids() == {("a", "x"), ("a", "y"), ("b", "x")}
    found = table.read()
    assert found is not None
    assert found["score"].to_list() == [0.1, 0.4, 0.3]


def test_no_rows_make_no_shard(table: Table) -> None:
    table.write(rows(a=1).slice(0, 0))
    assert table.read() is None
    assert not table.folder.is_folder()


def test_writing_leaves_only_complete_shards_and_a_part_of_another_writer_is_not_read(tmp_path: Path) -> None:
    table = Table(tmp_path, ["key"])
    table.write(rows(a=1))
    assert [Path(name).suffix for name in names(table.folder)] == [".parquet"]
    (tmp_path / ".00000000000000000001-abcdef.parquet.part").write_bytes(b"PAR1 half a shard")
    assert table.ids() == {"a"}
    assert len(names(table.folder)) == 2


def test_an_upload_that_was_not_completed_is_no_shard(remote: Location) -> None:
    table = Table(remote, ["key"])
    table.write(rows(a=1))
    filesystem, path = FileSystem.from_uri(f"{remote}/00000000000000000001-abcdef.parquet")
    with filesystem.open_output_stream(path) as upload:
        upload.write(bytes(20_000_000))
        assert table.ids() == {"a"}
        assert len(names(table.folder)) == 1


def test_a_shard_that_could_not_be_fetched_is_not_taken_for_a_damaged_one(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write(rows(a=1))

    def cut_off(self: Location) -> pa.NativeFile:
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    with monkeypatch.context() as patched, pytest.raises(InputError, match="cannot read .*NETWORK_CONNECTION"):
        patched.setattr(Location, "open", cut_off)
        table.shards()
    assert table.ids() == {"a"}


def test_a_write_that_fails_half_way_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    table = Table(tmp_path / "rows", ["key"])
    table.write(rows(a=1))
    before = names(table.folder)
    noise = np.random.default_rng(0).bytes(200_000)
    refused = pytest.raises(InputError, match=r"cannot write .*rows.*everything written so far is kept")
    with refused, small_files():
        table.write(rows(b=noise))
    assert names(table.folder) == before
    assert table.ids() == {"a"}


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("a file where the folder should be")
    for folder in (tmp_path / "rows", tmp_path / "rows" / "inside"):
        with pytest.raises(InputError, match="cannot write .*choose another --out"):
            Table(folder, ["key"]).write(rows(a=1))


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_shard_counts_as_missing_and_only_a_writer_sets_it_aside(
    table: Table, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    table.write(rows(a=1, b=2))
    table.write(rows(c=3))
    first, second = table.shards()
    whole = first.read_bytes()
    first.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "foreign": b"these are not the rows you look for"}[damage])
    assert table.ids() == {"c"}
    assert names(table.folder) == [first.name, second.name]
    assert first.name in caplog.text
    assert "its rows count as missing" in caplog.text
    table.repair()
    assert names(table.folder) == sorted([second.name, first.name.replace(".parquet", ".damaged")])
    assert "computed again" in caplog.text
    table.write(rows(a=1, b=2))
    assert table.ids() == {"a", "b", "c"}


def appender(table: Table) -> Appender[str]:
    return Appender(table, lambda records: rows(**dict.fromkeys(records, 1)))


def test_an_appender_writes_what_is_waiting_at_the_end_in_one_shard(table: Table) -> None:
    with appender(table) as waiting:
        waiting.add(["a"])
        waiting.add(["b", "c"])
        waiting.add([])
        assert table.ids() == set()
    assert table.ids() == {"a", "b", "c"}
    assert len(table.shards()) == 1


def test_an_appender_writes_also_when_the_stage_fails(table: Table) -> None:
    with pytest.raises(RuntimeError, match="on purpose"), appender(table) as waiting:
        waiting.add(["a", "b"])
        raise RuntimeError("on purpose")
    assert table.ids() == {"a", "b"}


def test_an_appender_that_was_interrupted_writes_what_it_had(table: Table) -> None:
    with pytest.raises(KeyboardInterrupt), appender(table) as waiting:
        waiting.add(["a"])
        raise KeyboardInterrupt
    assert table.ids() == {"a"}


def test_rows_already_flushed_are_not_written_again(table: Table) -> None:
    with appender(table) as waiting:
        waiting.add(["a"])
        waiting.flush()
        assert table.ids() == {"a"}
        waiting.flush()
    assert len(table.shards()) == 1


def test_an_appender_without_records_writes_nothing(table: Table) -> None:
    with appender(table):
        pass
    assert not table.folder.is_folder()


def test_a_new_run_folder_holds_the_experiment_and_a_manifest(place: Location, tiny_experiment: Experiment) -> None:
    run = RunFolder.create(place / "runs" / "first", tiny_experiment, SETTINGS)
    assert set(names(run.path)) - {".lock"} == {"experiment.toml", "manifest.json"}
    manifest = run.manifest()
    assert manifest["effects"]["settings"] == SETTINGS
    assert manifest["seed"] == 0
    assert manifest["versions"]["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert {"torch", "transformers", "ray"} <= set(manifest["versions"])
    opened, experiment = RunFolder(run.path), load_experiment(run.path)
    assert experiment == tiny_experiment
    assert opened.manifest() == manifest


def test_entries_of_the_manifest_come_back_equal_and_keep_their_neighbours(place: Location, tiny_experiment: Experiment) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    before = run.manifest()
    run.update_manifest(note="ünï", numbers=[1, 2.5, None])
    run.update_stage("fit", {"penalty": 0.01})
    run.update_stage("fit", {"rows": 3, "errors": {"0.01": 0.5}})
    run.update_stage("effects", {"shape": {"rows_per_step": 24}})
    assert RunFolder(place).manifest() == {
        **before,
        "note": "ünï",
        "numbers": [1, 2.5, None],
        "fit": {"penalty": 0.01, "rows": 3, "errors": {"0.01": 0.5}},
        "effects": {"settings": SETTINGS, "shape": {"rows_per_step": 24}},
    }
    assert set(names(place)) - {".lock"} == {"experiment.toml", "manifest.json"}


def test_a_damaged_manifest_is_refused_by_name(place: Location, tiny_experiment: Experiment) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    (place / "manifest.json").write_text('{"effects": ')
    with pytest.raises(InputError, match="manifest.json is damaged"):
        run.manifest()


def test_a_file_and_a_folder_that_is_no_run_are_refused_and_left_alone(place: Location, tiny_experiment: Experiment) -> None:
    thesis = place / "thesis.txt"
    thesis.write_text("a year's work")
    with pytest.raises(InputError, match="is a file; --out needs a folder"):
        RunFolder.create(thesis, tiny_experiment, SETTINGS)
    with pytest.raises(InputError, match="is not empty and holds no experiment.toml"):
        RunFolder.create(place, tiny_experiment, SETTINGS)
    assert names(place) == ["thesis.txt"]
    assert thesis.read_text() == "a year's work"


def test_an_empty_folder_and_a_run_folder_of_the_same_settings_are_taken(place: Location, tiny_experiment: Experiment) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    run.effects.write(pa.table({"vector_id": ["a"]}))
    again = RunFolder.create(place, tiny_experiment, json.loads(json.dumps(SETTINGS)))
    assert again.effects.ids() == {"a"}


@pytest.mark.parametrize("measured", ["effects", "baseline"])
def test_a_folder_of_effects_with_other_settings_is_refused_and_the_keys_are_named(
    place: Location, tiny_experiment: Experiment, measured: str
) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    getattr(run, measured).write(pa.table({"vector_id": ["a"]}))
    before = (place / "experiment.toml").read_text(), run.manifest()
    other = {"seed": 0, "effects": {"length": 20, "prompts": ["", "I think"], "top_k": 9}}
    with pytest.raises(InputError) as refused:
        RunFolder.create(place, tiny_experiment.model_copy(update={"description": "changed"}), other)
    assert "effects.length: 16 -> 20; effects.top_k: None -> 9" in str(refused.value)
    assert ((place / "experiment.toml").read_text(), run.manifest()) == before


def test_settings_may_change_as_long_as_nothing_was_measured(tmp_path: Path, tiny_experiment: Experiment) -> None:
    RunFolder.create(tmp_path, tiny_experiment, SETTINGS)
    other = {"seed": 0, "effects": {"length": 20}}
    assert RunFolder.create(tmp_path, tiny_experiment, other).manifest()["effects"]["settings"] == other


def test_differing_keys_are_named_with_their_section_and_both_values() -> None:
    before = {"a": 1, "same": {"x": [1, 2]}, "deep": {"er": {"key": "old"}}, "gone": True, "shape": {"x": 1}}
    now = {"a": 1, "same": {"x": [1, 2]}, "deep": {"er": {"key": "new"}}, "shape": 3}
    assert differing_keys(before, now) == ["deep.er.key: 'old' -> 'new'", "gone: True -> None", "shape: {'x': 1} -> 3"]
    assert differing_keys(before, before) == []


def test_a_second_writer_in_the_same_process_is_refused_until_the_first_is_done(
    place: Location, tiny_experiment: Experiment
) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    with run.locked():
        with pytest.raises(InputError, match="another saets process is writing"), RunFolder(place).locked():
            pass
        assert RunFolder(place).manifest()
    with RunFolder(place).locked():
        pass


def test_the_lock_is_let_go_after_an_exception(place: Location, tiny_experiment: Experiment) -> None:
    run = RunFolder.create(place, tiny_experiment, SETTINGS)
    with pytest.raises(RuntimeError, match="on purpose"), run.locked():
        raise RuntimeError("on purpose")
    with run.locked():
        pass


def test_a_folder_held_by_another_process_is_refused_until_that_process_is_killed(
    tmp_path: Path, tiny_experiment: Experiment
) -> None:
    run = RunFolder.create(tmp_path, tiny_experiment, SETTINGS)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another saets process is writing"), run.locked():
            pass
        other.kill()
    with run.locked():
        pass


def test_files_of_a_run_are_named_by_goal_and_method(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.vector("london", "sae_ts").local == tmp_path / "vectors" / "london--sae_ts.safetensors"
    assert run.approximator.local == tmp_path / "approximator.safetensors"
    assert run.grades("london", "a").folder != run.grades("london", "b").folder != run.grades("anger", "b").folder


def test_compacting_joins_small_shards_and_keeps_every_row(table: Table) -> None:
    for i in range(5):
        table.write(pa.table({"key": [f"{i}-{j}" for j in range(3)], "value": [i] * 3}))
    before = table.read()
    table.compact()
    assert len(table.shards()) == 1
    assert table.read().equals(before)
    table.write(pa.table({"key": ["0-0"], "value": [9]}))
    table.compact()
    assert table.read().filter(pl.col("key") == "0-0")["value"].item() == 9
    assert len(names(table.folder)) == 1


def interrupt(shard: Location) -> None:
    raise KeyboardInterrupt


def test_a_crash_between_joining_shards_and_removing_them_doubles_and_loses_nothing(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        table.write(pa.table({"key": [str(i)], "value": [i]}))
    before = table.read()

    with monkeypatch.context() as patched:
        patched.setattr(Location, "delete", interrupt)
        with pytest.raises(KeyboardInterrupt):
            table.compact()
    assert sum(len(read_shard(shard)) for shard in table.shards()) == 3
    assert table.read().equals(before)
    assert len(names(table.folder)) == 4, "reading deletes nothing"
    table.repair()
    assert len(names(table.folder)) == 1
    assert table.read().equals(before)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_reading_a_run_changes_no_file_of_it_and_a_writer_repairs_every_table(
    tmp_path: Path, tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path, tiny_experiment, SETTINGS)
    graded = run.grades("london", "a")
    tables = [run.effects, run.generations, run.battles, run.measures, run.side_effects, graded]
    for table in tables:
        for i in range(2):
            table.write(pa.table({name: [str(i)] for name in table.key}))
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Location, "delete", interrupt)
            table.compact()
        (table.folder / "0.parquet").write_bytes(b"half a shard")
    before = state(tmp_path)
    opened = RunFolder(tmp_path)
    for table in (*opened.tables(), opened.grades("london", "a")):
        assert len(table.ids()) in (0, 2)
        assert table.is_empty() == (table.read() is None)
    assert opened.judged("london").keys() == {"a"}
    assert state(tmp_path) == before
    RunFolder.create(tmp_path, tiny_experiment, SETTINGS)
    for table in tables:
        assert sorted(Path(name).suffix for name in names(table.folder) if "." in name) == [".damaged", ".parquet"]
        assert len(table.ids()) == 2


def test_large_shards_are_left_alone(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saets.run_folder.store.SHARD_BYTES", 100)
    for i in range(3):
        table.write(pa.table({"key": [str(i)], "value": [i]}))
    before = names(table.folder)
    table.compact()
    assert names(table.folder) == before
