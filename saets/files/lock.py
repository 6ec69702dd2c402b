"""One writer a run folder: a lock of the operating system on a file system, a lease in an object store."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saets.errors import InputError
from saets.files.storage import Location

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""File or object that is held by the one process that writes a run folder."""

RENEW_SECONDS = 10.0
"""A holder writes its lease again this often."""

LEASE_SECONDS = 60.0
"""A lease this old belongs to a process that was killed."""


@contextlib.contextmanager
def held(folder: Location) -> Iterator[None]:
    """Hold a folder for one writer. A killed process lets go by itself: at once on a file system, else after `LEASE_SECONDS`.

    Raises:
        InputError: another writer holds it (said at once), or it cannot be written.
    """
    with _locked(folder, folder.local) if folder.local is not None else _leased(Lease(folder)):
        yield


@contextlib.contextmanager
def _locked(folder: Location, path: Path) -> Iterator[None]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("w")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _taken(folder) from error
        yield


@contextlib.contextmanager
def _leased(lease: Lease) -> Iterator[None]:
    done = threading.Event()

    def keep() -> None:
        while not done.wait(RENEW_SECONDS):
            lease.renew()

    lease.take()
    keeper = threading.Thread(target=keep, name="saets-lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        lease.release()


class Lease:
    """An object that says who writes a folder, and since when it has not been renewed.

    It keeps people from starting a second writer, and is no mutual exclusion: pyarrow offers no write-if-absent, so of two
    writers that start in the same instant both may go on, and one that was cut off for longer than `LEASE_SECONDS` may come
    back to find another. Hosts' clocks have to agree within that time. No row is lost or doubled even then: a shard is an
    object of its own, ids come from content, and reading keeps one row of each id. The manifest and the files that are
    replaced whole hold what was written last.
    """

    def __init__(self, folder: Location, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._object, self._clock = folder, folder / LOCK, clock
        self._token = uuid.uuid4().hex

    def take(self) -> None:
        """Begin to hold the folder; the lease of a dead holder is taken over.

        Raises:
            InputError: another holder is alive, or the store cannot be written.
        """
        holder = self._holder()
        age = self._clock() - holder.get("time", 0)
        if holder and age < LEASE_SECONDS:
            raise _taken(self._folder, holder, LEASE_SECONDS - age)
        self._write()
        holder = self._holder()
        if holder.get("token") != self._token:
            raise _taken(self._folder, holder, LEASE_SECONDS)

    def renew(self) -> None:
        """Say that the holder is alive; a store that cannot be reached now, or another holder, is a warning."""
        try:
            holder = self._holder()
            if holder.get("token", self._token) != self._token:
                logger.warning("%s is written by another saets process too (%s); stop one of them", self._folder, _who(holder))
                return
            self._write()
        except InputError as error:
            logger.warning("the lease on %s could not be renewed: %s", self._folder, error)

    def release(self) -> None:
        """Let go, unless another holds the folder by now; where the store cannot be reached, the lease ends by itself."""
        try:
            if self._holder().get("token") == self._token:
                self._object.delete()
        except InputError as error:
            logger.warning("the lease on %s could not be given back: %s", self._folder, error)

    def _holder(self) -> dict[str, Any]:
        """What the lease says; nothing where there is none, or one that cannot be understood."""
        if not self._object.is_file():
            return {}
        content = self._object.read_bytes()
        try:
            holder = json.loads(content)
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) and isinstance(holder.get("time"), int | float) else {}

    def _write(self) -> None:
        lease = {"token": self._token, "host": socket.gethostname(), "pid": os.getpid(), "time": self._clock()}
        self._object.write_text(json.dumps(lease) + "\n")


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _taken(folder: Location, holder: dict[str, Any] | None = None, seconds: float = 0.0) -> InputError:
    known = f" ({_who(holder)}; if it was killed, its lease ends in {seconds:.0f} seconds)" if holder else ""
    return InputError(f"another saets process is writing {folder}{known}; wait for it or give another --out")
