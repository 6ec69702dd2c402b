"""The parts of a build: each has a folder of its own, is made once for its settings and for what it needs, and can be stopped.

A folder is named by a hash of all that decides what is in it, so a changed setting remakes that part and those that need it, and
a setting changed back finds what was there. `made.json` is written last; a part without it goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assets.settings import Settings
from saets.engine.machine import free_bytes
from saets.errors import InputError, unknown

MADE = "made.json"


@dataclass(frozen=True)
class Need:
    """What a part takes at most."""

    disk: float = 0.0
    """Bytes."""
    memory: float = 0.0
    """Bytes, beside what Python and torch take."""


@dataclass(frozen=True)
class Part:
    """One part; `make` fills a folder and gives facts worth keeping."""

    make: Callable[[Build, Path], Mapping[str, Any]]
    reads: tuple[str, ...]
    """Sections of the settings that decide the result."""
    after: tuple[str, ...] = ()
    """Parts whose results it reads."""
    need: Callable[[Settings], Need] = lambda _: Need()
    also: Callable[[Build], Any] = lambda _: None
    """What else decides the result, as JSON holds it."""


class Build:
    """A work folder and the parts in it."""

    def __init__(self, work: Path, settings: Settings, parts: Mapping[str, Part]) -> None:
        self.work, self.settings, self.parts = work, settings, parts

    def folder(self, name: str) -> Path:
        """Where the part's result is, or will be."""
        return self.work / f"{name}-{self._fingerprint(name)}"

    def is_made(self, name: str) -> bool:
        """Whether the part is whole."""
        return (self.folder(name) / MADE).is_file()

    def facts(self, name: str) -> dict[str, Any]:
        """What was kept of a part that is made."""
        found: dict[str, Any] = json.loads((self.folder(name) / MADE).read_text(encoding="utf-8"))
        return found

    def to_make(self, names: Sequence[str]) -> list[str]:
        """The parts and those that they need, in order, without what is made.

        Raises:
            InputError: an unknown part.
        """
        for name in names:
            if name not in self.parts:
                raise unknown("part", name, self.parts)
        wanted: dict[str, None] = {}

        def want(name: str) -> None:
            for before in self.parts[name].after:
                want(before)
            wanted[name] = None

        for name in names:
            want(name)
        return [name for name in wanted if not self.is_made(name)]

    def make(self, names: Sequence[str]) -> None:
        """Make the parts and what they need.

        Raises:
            InputError: too little disk or memory, before anything is made; or what a part says.
        """
        missing = self.to_make(names)
        self._check_room(missing)
        for name in missing:
            folder = self.folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{name}: in {folder}", file=sys.stderr)
            started = time.monotonic()
            facts = self.parts[name].make(self, folder)
            made = {
                "part": name,
                "settings": self._settings(name),
                "needs": {before: self._fingerprint(before) for before in self.parts[name].after},
                "seconds_last_run": round(time.monotonic() - started, 1),
                "date": datetime.now(UTC).date().isoformat(),
                "machine": machine(),
                **facts,
            }
            whole(folder / MADE, lambda path, made=made: path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
            said = ", ".join(f"{key} {value}" for key, value in facts.items() if not isinstance(value, Mapping))
            print(f"{name}: {said or 'made'}", file=sys.stderr)

    def _settings(self, name: str) -> dict[str, Any]:
        return {section: dataclasses.asdict(getattr(self.settings, section)) for section in self.parts[name].reads}

    def _fingerprint(self, name: str) -> str:
        part = self.parts[name]
        decides = [self._settings(name), [self._fingerprint(before) for before in part.after], part.also(self)]
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=4).hexdigest()

    def _check_room(self, missing: Sequence[str]) -> None:
        needs = {name: self.parts[name].need(self.settings) for name in missing}
        self.work.mkdir(parents=True, exist_ok=True)
        there = sum(_size(self.folder(name)) for name in missing)
        disk, free = sum(need.disk for need in needs.values()), shutil.disk_usage(self.work).free + there
        if disk > free:
            raise InputError(
                f"the build takes {disk / 1e9:.1f} GB of disk ({', '.join(missing)}); {self.work} has {free / 1e9:.1f} GB free. "
                "Give --work a larger disk, or fewer tokens (--set passages.tokens=...)"
            )
        memory = _free_memory()
        for name, need in needs.items():
            if need.memory > memory:
                raise InputError(
                    f"{name} takes {need.memory / 1e9:.1f} GB of memory; {memory / 1e9:.1f} GB are free. Close what else runs, "
                    "or lower its settings"
                )


def _free_memory() -> float:
    try:
        return free_bytes(torch.device("cpu"))
    except ImportError:  # a bare machine, where nothing tells
        return math.inf


def machine() -> str:
    """Processor, cores and GPU."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {os.cpu_count()} cores{gpu}"


def whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file or folder that gets its name only when it is complete."""
    making = path.with_name(f"making-{path.name}")
    shutil.rmtree(making, ignore_errors=True)
    write(making)
    making.replace(path)


def save_arrays(path: Path, **arrays: Any) -> None:
    """A .npz file, whole."""

    def write(making: Path) -> None:
        with making.open("wb") as file:
            np.savez(file, **arrays)

    whole(path, write)


class Progress:
    """Tells how far a part is, with its rate and the time left, at most every few seconds."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._first, self._started = what, total, done, time.monotonic()
        self._out = sys.stderr  # also where a library's own progress is being kept away from it
        self._pause, self._shown = 1 if sys.stderr.isatty() else 30, self._started

    def at(self, done: int) -> None:
        """`done` of the total, what an earlier run did included."""
        now = time.monotonic()
        if now - self._shown < self._pause:
            return
        self._shown = now
        rate = (done - self._first) / (now - self._started)
        left = f", {max(0, self._total - done) / rate:,.0f} s left" if rate else ""
        print(f"{self._what}: {done:,} of {self._total:,}, {rate:,.0f} a second{left}", file=self._out, flush=True)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _processor() -> str:
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
