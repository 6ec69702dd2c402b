"""The parts of a build: each has a folder of its own, is made once for its settings and for what it needs, and can be stopped.

A folder is named by a hash of the settings and texts that decide what is in it, so a change remakes that part and those that
need it, and what is changed back finds what was there. The machine, and where the model's weights lie, are no part of it.
`made.json` is written last; a part without it goes on where it was stopped. A change of the code is not noticed: delete the
folder then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assets.settings import DECIDES, Settings
from saets.engine.machine import free_bytes
from saets.errors import InputError, unknown

MADE, RUNS = "made.json", "runs.json"

RECORD_SECONDS = 30.0
"""How often the time that a part has taken is written down while it is made."""


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
    check: Callable[[Build], None] = lambda _: None
    """Raises `InputError` where something that it needs is not there; called before any part is made."""
    each_time: bool = False
    """Made whenever it is asked for, since its result lies elsewhere."""


class Build:
    """A work folder and the parts in it."""

    def __init__(self, work: Path, settings: Settings, parts: Mapping[str, Part], weights: Path | None = None) -> None:
        """`weights` is a folder written by transformers' save_pretrained, where the subject's package is not installed."""
        self.work, self.settings, self.parts, self.weights = work, settings, parts, weights

    def folder(self, name: str) -> Path:
        """Where the part's result is, or will be."""
        return self.work / f"{name}-{self._fingerprint(name)}"

    def is_made(self, name: str) -> bool:
        """Whether the part is whole."""
        return not self.parts[name].each_time and (self.folder(name) / MADE).is_file()

    def facts(self, name: str) -> dict[str, Any]:
        """What was kept of a part that is made."""
        found: dict[str, Any] = json.loads((self.folder(name) / MADE).read_text(encoding="utf-8"))
        return found

    def to_make(self, names: Sequence[str]) -> list[str]:
        """The parts and those that they need, in order, without what is made and what only that needed.

        Raises:
            InputError: an unknown part.
        """
        for name in names:
            if name not in self.parts:
                raise unknown("part", name, self.parts)
        wanted: dict[str, None] = {}

        def want(name: str) -> None:
            if not self.is_made(name):
                for before in self.parts[name].after:
                    want(before)
                wanted[name] = None

        for name in names:
            want(name)
        return list(wanted)

    def make(self, names: Sequence[str]) -> None:
        """Make the parts and what they need.

        Raises:
            InputError: too little disk or memory, before anything is made; or what a part says.
        """
        missing = self.to_make(names)
        self._check_room(missing)
        for name in missing:
            self.parts[name].check(self)
        for name in missing:
            folder = self.folder(name)
            folder.mkdir(parents=True, exist_ok=True)
            print(f"{name}: in {folder}", file=sys.stderr)
            with _run_of(folder):
                facts = self.parts[name].make(self, folder)
            made = {
                "part": name,
                "settings": self._settings(name, all_of_them=True),
                "needs": {before: self._fingerprint(before) for before in self.parts[name].after},
                "runs": json.loads((folder / RUNS).read_text(encoding="utf-8")),
                **facts,
            }
            whole(folder / MADE, lambda path, made=made: path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8"))
            said = ", ".join(f"{key} {value}" for key, value in facts.items() if not isinstance(value, Mapping))
            print(f"{name}: {said or 'made'}", file=sys.stderr)

    def _settings(self, name: str, *, all_of_them: bool = False) -> dict[str, Any]:
        """Those that decide the part's result, or all of its sections."""
        sections = {section: getattr(self.settings, section) for section in self.parts[name].reads}
        return {
            section: {
                field.name: getattr(values, field.name)
                for field in dataclasses.fields(values)
                if all_of_them or field.metadata.get(DECIDES, True)
            }
            for section, values in sections.items()
        }

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
    """Let `write` fill a file or folder that gets its name only when it is complete, in place of what had that name."""
    making = path.with_name(f"making-{path.name}")
    shutil.rmtree(making, ignore_errors=True)
    write(making)
    if path.is_dir():
        shutil.rmtree(path)
    making.replace(path)


def digest(texts: Iterable[str]) -> str:
    """Of texts that decide a result."""
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()


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
        pace = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(f"{self._what}: {done:,} of {self._total:,}, {pace} a second{left}", file=self._out, flush=True)


@contextlib.contextmanager
def _run_of(folder: Path) -> Iterator[None]:
    """Record when, on what and for how long a part was worked on; one that is killed loses `RECORD_SECONDS` at most."""
    runs = json.loads((folder / RUNS).read_text(encoding="utf-8")) if (folder / RUNS).is_file() else []
    run: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "machine": machine()}
    started, over = time.monotonic(), threading.Event()

    def record() -> None:
        text = json.dumps([*runs, run | {"seconds": round(time.monotonic() - started, 1)}], indent=1) + "\n"
        whole(folder / RUNS, lambda path: path.write_text(text, encoding="utf-8"))

    def keep_recording() -> None:
        while not over.wait(RECORD_SECONDS):
            record()

    record()
    recorder = threading.Thread(target=keep_recording, daemon=True)
    recorder.start()
    try:
        yield
    finally:
        over.set()
        recorder.join()
        record()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _processor() -> str:
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
