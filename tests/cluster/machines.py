"""Ray nodes in processes of their own, as `ray start` makes them: each with its folder, and a mark by which all can be killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
MARK = "SAETS_TEST_MACHINE"
SMALL = ("--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1")


def until(true: Callable[[], Any], what: str, *, seconds: float = 400, every: float = 0.2) -> Any:
    """What `true` gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"no {what} in {seconds} s"
        time.sleep(every)
    return found


def free_port(start: int = 7000) -> int:
    """Below the range that Ray gives to its workers, and another each time."""
    for port in _PORTS.setdefault(start, iter(range(start + os.getpid() % 900, start + 1000))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


_PORTS: dict[int, Iterator[int]] = {}


class Machine:
    """One node."""

    def __init__(self, environment: dict[str, str], *options: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="sm", dir="/tmp"))  # the paths of Ray's sockets must be short
        self._log = (self.folder / "log").open("w")
        agent = (
            f"--dashboard-agent-listen-port={free_port(9000)}"  # by default one port, which several nodes of a machine fight for
        )
        self._process = subprocess.Popen(
            [str(BIN / "ray"), "start", "--block", *SMALL, f"--temp-dir={self.folder}", agent, *options],
            env={**os.environ, **environment, MARK: self.mark},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def kill(self) -> None:
        """All its processes at once, as when the power fails."""
        mark = f"{MARK}={self.mark}".encode()
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environment.read_bytes().split(b"\0"):
                    os.kill(int(environment.parent.name), signal.SIGKILL)
        self._process.wait()

    def remove(self) -> None:
        """Kill it and take its folder away."""
        self.kill()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Machines:
    """A head that holds no actors, and workers with one slot each."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self.port, self.dashboard = free_port(), 0
        self._all: list[Machine] = []
        self.start()

    def start(self) -> None:
        """The head, once its dashboard answers."""
        self.dashboard = next(port for port in range(self.port + 1, 10000) if _is_free(port))
        head = ("--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--num-cpus=0")
        client = f"--ray-client-server-port={20000 + self.port % 1000}"
        self._all.append(Machine(self._environment, *head, client))
        until(lambda: not _is_free(self.dashboard), "dashboard")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def add(self) -> Machine:
        """A worker; it joins while others work."""
        self._all.append(Machine(self._environment, f"--address=127.0.0.1:{self.port}", "--num-cpus=1"))
        return self._all[-1]

    def remove(self) -> None:
        """All of it, workers first."""
        for machine in reversed(self._all):
            machine.remove()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@contextlib.contextmanager
def machines(environment: dict[str, str]) -> Iterator[Machines]:
    """A cluster of them, gone afterwards."""
    started = Machines(environment)
    try:
        yield started
    finally:
        started.remove()
