"""Rows put aside on disk come back as they were, and a disk without room is named."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest

from saets.errors import InputError
from saets.fit.spool import Spool


def columns(rows: int, seed: int) -> tuple[np.ndarray, ...]:
    """Columns of several shapes and types; rows are 8 + 2 x 5 + 8 bytes."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(rows, 2)).astype(np.float32), draw.normal(size=(rows, 5)).astype(np.float16), draw.normal(size=rows)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_rows_come_back_in_order_as_often_as_wanted(at_once: int) -> None:
    parts = [columns(rows, seed) for seed, rows in enumerate((3, 0, 4))]
    with Spool(7) as spool:
        for part in parts:
            spool.add(*part)
        for _ in range(2):
            found = list(spool.batches(at_once))
            assert [len(rows[0]) for rows in found] == {1: [1] * 7, 4: [4, 3], 100: [7]}[at_once]
            for i, expected in enumerate(zip(*parts, strict=True)):
                column = np.concatenate([rows[i] for rows in found])
                assert column.dtype == expected[0].dtype
                assert np.array_equal(column, np.concatenate(expected))


def test_where_nothing_was_put_aside_nothing_comes_back() -> None:
    with Spool(0) as spool:
        assert list(spool.batches(4)) == []


def test_the_file_has_no_name_to_be_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Spool(3) as spool:
        spool.add(*columns(3, 0))
        assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_what_was_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "r+b"))
    with Spool(10**6) as spool, pytest.raises(InputError, match=rf"in {tmp_path} \(.*\): they need about 26 MB; .* set TMPDIR"):
        spool.add(*columns(3, 0))


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with Spool(3) as spool, pytest.raises(InputError, match="cannot keep rows in .*nowhere .*set TMPDIR"):
        spool.add(*columns(3, 0))
