"""Rows put aside on disk, to be gone through again without reading them from where they came."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

from saets.errors import InputError


class Spool:
    """Rows in a temporary file on this machine, in the folder that TMPDIR names; it has no name and goes with the process."""

    def __init__(self, expected_rows: int) -> None:
        """`expected_rows` tells whoever runs out of disk how much would have been needed."""
        self._expected_rows, self._type = expected_rows, np.dtype([])
        self._file: IO[bytes] | None = None

    def add(self, *columns: np.ndarray) -> None:
        """Put rows aside: columns of equal length, each with the type and row shape that it had in the calls before.

        Raises:
            InputError: the disk is full or fails, or no temporary file can be made.
        """
        self._type = np.dtype([(f"{i}", column.dtype, column.shape[1:]) for i, column in enumerate(columns)])
        records = np.empty(len(columns[0]), self._type)
        for name, column in zip(self._type.names or (), columns, strict=True):
            records[name] = column
        try:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(records.data)  # `tofile` says nothing of a disk that is full
            self._file.flush()
        except OSError as error:
            needed = self._expected_rows * self._type.itemsize / 1e6
            raise InputError(
                f"cannot keep rows in {tempfile.tempdir or 'a temporary file'} ({error}): they need about {needed:.0f} MB; make "
                "room, or set TMPDIR to a folder that has it"
            ) from error

    def batches(self, rows: int) -> Iterator[tuple[np.ndarray, ...]]:
        """All rows in the order in which they came, so many at a time, as the columns they were."""
        if self._file is None:
            return
        self._file.seek(0)
        while len(records := np.fromfile(self._file, self._type, rows)):
            yield tuple(np.ascontiguousarray(records[name]) for name in self._type.names or ())

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with contextlib.suppress(OSError):  # what a full disk did not take is written again
                self._file.close()
