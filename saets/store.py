"""The run folder: what is written, whole or not at all, and how a stage sees what is already there.

Rows are Parquet shards that get their name only when complete; a shard that cannot be read is set aside and its rows are
computed again. The manifest records versions, the execution shape and, for each stage, the settings it was made with.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from saets.config import Experiment
from saets.errors import InputError

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Rows wait at most this long before they are written."""

MOST_WAITING = 1024
"""Nor do more rows than this wait: with 131,072 features they take half a GiB."""

REPLACES = b"saets.replaces"
"""Key in a shard's metadata: names of the shards whose rows it holds."""

SHARD_BYTES = 64 * 2**20
"""Size that `Table.compact` aims at."""

LOCK = ".lock"
"""Held by the one process that writes a run folder."""

Record = TypeVar("Record")

PACKAGES = ("saets", "torch", "transformers", "transformer-lens", "sae-lens", "ray", "polars")


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class Table:
    """Rows of one kind as Parquet shards in a folder, identified by the columns `key`."""

    def __init__(self, folder: Path, key: Sequence[str]) -> None:
        self.folder, self.key = folder, list(key)

    def shards(self) -> list[Path]:
        """Complete shards in the order of their names; damaged ones are set aside with a warning, replaced ones are gone."""
        good: list[Path] = []
        replaced: set[str] = set()
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                found = pq.read_schema(path).metadata or {}
                replaced |= set(json.loads(found.get(REPLACES, b"[]")))
                good.append(path)
            except (pa.ArrowInvalid, OSError) as error:
                aside = path.with_suffix(".damaged")
                path.rename(aside)
                logger.warning("%s cannot be read (%s); set aside as %s, its rows are computed again", path, error, aside.name)
        for path in good:
            if path.name in replaced:
                path.unlink(missing_ok=True)
        return [path for path in good if path.name not in replaced]

    def write(self, rows: pa.Table) -> None:
        """Add a shard; it appears with all its rows or not at all.

        Raises:
            InputError: the folder cannot be written or the disk is full.
        """
        if not rows.num_rows:
            return
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}.parquet"
        temporary = self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows, temporary, compression="zstd", use_dictionary=False, row_group_size=256)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise InputError(
                f"cannot write {self.folder}: {error.strerror or error}; make room or choose another --out, then run the same "
                "command again: everything written so far is kept"
            ) from error

    def compact(self) -> None:
        """Join small shards into larger ones. The new one names those it replaces, so a crash loses and doubles nothing."""
        small = [path for path in self.shards() if path.stat().st_size < SHARD_BYTES // 2]
        groups: list[list[Path]] = [[]]
        for path in small:
            if sum(one.stat().st_size for one in groups[-1]) + path.stat().st_size > SHARD_BYTES:
                groups.append([])
            groups[-1].append(path)
        for group in groups:
            if len(group) > 1:
                rows = pa.concat_tables([pq.read_table(path) for path in group])
                names = json.dumps([path.name for path in group]).encode()
                self.write(rows.replace_schema_metadata({**(rows.schema.metadata or {}), REPLACES: names}))
        self.shards()

    def read(self, columns: Sequence[str] | None = None) -> pl.DataFrame | None:
        """All rows, sorted by key, the newest of each key; None where nothing was written."""
        shards = self.shards()
        if not shards:
            return None
        frame = pl.read_parquet(shards, columns=list(columns) if columns else None)
        present = [name for name in self.key if name in frame.columns]
        return frame.unique(present, keep="last", maintain_order=True).sort(present)

    def ids(self) -> set[Any]:
        """The keys written so far; plain values where the key is one column, else tuples."""
        frame = self.read(self.key)
        if frame is None:
            return set()
        return set(frame[self.key[0]]) if len(self.key) == 1 else set(frame.select(self.key).iter_rows())


class Appender(Generic[Record]):
    """Collects records and writes them every few seconds, when there are many, and at the end, also when the stage fails."""

    def __init__(self, table: Table, to_arrow: Callable[[list[Record]], pa.Table]) -> None:
        self.table, self._to_arrow = table, to_arrow
        self._waiting: list[Record] = []
        self._written = time.monotonic()

    def add(self, records: Iterable[Record]) -> None:
        """Take records; they are on disk some seconds later."""
        self._waiting.extend(records)
        if time.monotonic() - self._written > FLUSH_SECONDS or len(self._waiting) >= MOST_WAITING:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._waiting:
            self.table.write(self._to_arrow(self._waiting))
        self._waiting = []
        self._written = time.monotonic()

    def __enter__(self) -> Appender[Record]:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.effects = Table(path / "effects", ["vector_id"])
        self.baseline = Table(path / "effects" / "baseline", ["vector_id"])
        self.waiting = Table(path / "effects" / "waiting", ["vector_id"])
        self.failures = Table(path / "effects" / "failed", ["vector_id"])
        self.generations = Table(path / "generations", ["generation_id"])

    def grades(self, goal: str, settings: str) -> Table:
        """Grades of one goal by one judge; `settings` is the hash of what the judge was told."""
        return Table(self.path / "grades" / f"{goal}-{settings}", ["generation_id", "criterion"])

    @property
    def approximator(self) -> Path:
        return self.path / "approximator.safetensors"

    def vector(self, goal: str, method: str) -> Path:
        """File of the vector of a goal and method."""
        return self.path / "vectors" / f"{goal}--{method}.safetensors"

    @classmethod
    def create(cls, path: Path, experiment: Experiment, effect_settings: Mapping[str, Any]) -> RunFolder:
        """The folder for this experiment, made where it does not exist.

        Raises:
            InputError: not a run folder, not writable, or it holds effects measured with other settings (names the keys).
        """
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; --out needs a folder")
        run = cls(path)
        if path.is_dir() and any(run._foreign()) and not (path / "experiment.toml").is_file():
            raise InputError(f"{path} is not empty and holds no experiment.toml; give --out a new folder or a run folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            with run.locked():
                run._check_effect_settings(effect_settings)
                write_whole(path / "experiment.toml", experiment.to_toml())
                run.update_manifest(versions=versions(), git_commit=git_commit(), seed=experiment.seed)
                run.update_stage("effects", {"settings": dict(effect_settings)})
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
        return run

    def _foreign(self) -> Iterator[Path]:
        return (path for path in self.path.iterdir() if path.name != LOCK)

    def _check_effect_settings(self, settings: Mapping[str, Any]) -> None:
        before = self.manifest().get("effects", {}).get("settings")
        if before is None or not (self.effects.shards() or self.baseline.shards()):
            return
        different = differing_keys(before, settings)
        if different:
            raise InputError(
                f"{self.path} holds effects measured with other settings ({'; '.join(different)}); "
                "set them back, or give --out a new folder"
            )

    def manifest(self) -> dict[str, Any]:
        """What manifest.json holds; empty where there is none yet."""
        path = self.path / "manifest.json"
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged ({error}); move it away and run again") from error
        if not isinstance(manifest, dict):
            raise InputError(f"{path} holds a {type(manifest).__name__}, not a table; move it away and run again")
        return manifest

    def update_manifest(self, **entries: Any) -> None:
        """Set top-level entries of the manifest."""
        manifest = {**self.manifest(), **entries}
        write_whole(self.path / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    def update_stage(self, stage: str, entries: Mapping[str, Any]) -> None:
        """Set entries of one stage, keeping its others."""
        self.update_manifest(**{stage: {**self.manifest().get(stage, {}), **entries}})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for one writer; a second one gets an `InputError` at once. A killed process lets go by itself."""
        with (self.path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another saets process is writing {self.path}; wait for it or give another --out") from error
            yield


def differing_keys(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Each setting that differs, as `section.key: before -> now`."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differing_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit() -> str | None:
    """The commit of the checkout this package runs from, or None."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
