"""The run folder: what is written, whole or not at all, and how a stage sees what is already there.

Rows are Parquet shards that get their name only when complete. Reading changes nothing; whoever holds the folder for writing sets
shards aside that cannot be read, and their rows are computed again. The manifest records versions, the execution shape and, for
each stage, the settings it was made with.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.method_id import parse_method
from saets.files.lock import LOCK, held
from saets.files.storage import Location, Where, locate

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5.0
"""Rows wait at most this long before they are written."""

MOST_WAITING = 256
"""Nor do more rows than this wait: with 131,072 features they take 128 MiB."""

SUFFIX = ".parquet"

REPLACES = b"saets.replaces"
"""Key in a shard's metadata: names of the shards whose rows it holds."""

SHARD_BYTES = 64 * 2**20
"""Size that `Table.compact` aims at."""

GRADE_KEY = ("generation_id", "criterion")

Record = TypeVar("Record")

PACKAGES = ("saets", "torch", "transformers", "transformer-lens", "sae-lens", "ray", "polars")


class _Sorted(NamedTuple):
    good: list[Location]
    replaced: list[Location]
    """Their rows are in a good one."""
    damaged: list[tuple[Location, str]]
    """With the reason."""


class Table:
    """Rows of one kind as Parquet shards in a folder, identified by the columns `key`."""

    def __init__(self, folder: Where, key: Sequence[str]) -> None:
        self.folder, self.key = locate(folder), list(key)

    def shards(self) -> list[Location]:
        """Complete shards in the order of their names. Damaged ones are left out with a warning; nothing is changed.

        Raises:
            InputError: the folder cannot be read; a shard that could not be fetched is not taken for a damaged one.
        """
        found = self._sorted()
        for shard, reason in found.damaged:
            logger.warning("%s cannot be read (%s); its rows count as missing", shard, reason)
        return found.good

    def repair(self) -> None:
        """Set damaged shards aside and delete replaced ones; only for who holds the folder for writing.

        Raises:
            InputError: see `shards`; or the folder cannot be written.
        """
        found = self._sorted()
        for shard, reason in found.damaged:
            aside = shard.name.removesuffix(SUFFIX) + ".damaged"
            shard.rename(aside)
            logger.warning("%s cannot be read (%s); set aside as %s, its rows are computed again", shard, reason, aside)
        for shard in found.replaced:
            shard.delete()

    def is_empty(self) -> bool:
        """Whether no shard is there, damaged ones included."""
        return not any(name.endswith(SUFFIX) for name in self.folder.entries())

    def _sorted(self) -> _Sorted:
        """The shards by what is to be done with them."""
        readable: list[Location] = []
        damaged: list[tuple[Location, str]] = []
        replaced: set[str] = set()
        for shard in [self.folder / name for name in self.folder.entries() if name.endswith(SUFFIX)]:
            try:
                about = _schema(shard).metadata or {}
                replaced |= set(json.loads(about.get(REPLACES, b"[]")))
                readable.append(shard)
            except (pa.ArrowInvalid, OSError) as error:
                damaged.append((shard, str(error)))
        good = [shard for shard in readable if shard.name not in replaced]
        return _Sorted(good, [shard for shard in readable if shard.name in replaced], damaged)

    def write(self, rows: pa.Table) -> None:
        """Add a shard; it appears with all its rows or not at all.

        Raises:
            InputError: the folder cannot be written or the disk is full.
        """
        if not rows.num_rows:
            return
        shard = io.BytesIO()
        pq.write_table(rows, shard, compression="zstd", use_dictionary=False, row_group_size=256)
        (self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:6]}{SUFFIX}").write_bytes(shard.getvalue())

    def compact(self) -> None:
        """Join small shards into larger ones. The new one names those it replaces, so a crash loses and doubles nothing."""
        shards, entries = self.shards(), self.folder.entries()
        groups: list[list[Location]] = [[]]
        filled = 0
        for shard in shards:
            size = entries[shard.name].size
            if size >= SHARD_BYTES // 2:
                continue
            if filled + size > SHARD_BYTES:
                groups.append([])
                filled = 0
            groups[-1].append(shard)
            filled += size
        for group in groups:
            if len(group) > 1:
                rows = pa.concat_tables([read_shard(shard) for shard in group])
                names = json.dumps([shard.name for shard in group]).encode()
                self.write(rows.replace_schema_metadata({**(rows.schema.metadata or {}), REPLACES: names}))
        self.repair()

    def read(self, columns: Sequence[str] | None = None) -> pl.DataFrame | None:
        """All rows, sorted by key, the newest of each key; None where nothing was written."""
        shards = self.shards()
        if not shards:
            return None
        frame = pl.DataFrame(pl.from_arrow(pa.concat_tables([read_shard(shard, columns) for shard in shards])))
        present = [name for name in self.key if name in frame.columns]
        return frame.unique(present, keep="last", maintain_order=True).sort(present)

    def ids(self) -> set[Any]:
        """The keys written so far; plain values where the key is one column, else tuples."""
        frame = self.read(self.key)
        if frame is None:
            return set()
        return set(frame[self.key[0]]) if len(self.key) == 1 else set(frame.select(self.key).iter_rows())


def read_shard(shard: Location, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard that `Table.shards` named.

    Raises:
        InputError: it is gone, or the storage fails.
    """
    with open_shard(shard) as file:
        return file.read(list(columns) if columns else None)


@contextlib.contextmanager
def open_shard(shard: Location) -> Iterator[pq.ParquetFile]:
    """A shard that `Table.shards` named, to read some of it.

    Raises:
        InputError: it is gone, or the storage fails, here or while it is read.
    """
    try:
        with shard.open() as content, pq.ParquetFile(content) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {shard}: {' '.join(str(error).split())}; run the same command again") from error


def _schema(shard: Location) -> pa.Schema:
    """The columns of a shard; where pyarrow fails, of the bytes fetched anew, so that only damage can be the reason."""
    try:
        with shard.open() as file:
            return pq.read_schema(file)
    except (OSError, pa.ArrowInvalid):
        return pq.read_schema(pa.BufferReader(shard.read_bytes()))


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

    def __init__(self, path: Where) -> None:
        self.path = locate(path)
        self.effects = Table(self.path / "effects", ["vector_id"])
        self.baseline = Table(self.path / "effects" / "baseline", ["vector_id"])
        self.waiting = Table(self.path / "effects" / "waiting", ["vector_id"])
        self.failures = Table(self.path / "effects" / "failed", ["vector_id"])
        self.summed = Table(self.path / "effects" / "summed", ["vector_id"])
        """Vectors whose effects are kept in `moments` alone: what the effects' table says of them, without vector and effect."""
        self.published_effects = Table(self.path / "published" / "effects", ["vector_id"])
        self.generations = Table(self.path / "generations", ["generation_id"])
        self.side_effects = Table(self.path / "side_effects", ["vector_id"])
        """By ids of vector and scale together."""
        self.unsteered = Table(self.path / "side_effects" / "unsteered", ["settings", "vector_id"])
        """Baseline of the side effects where the run has none of its own, by the hash of the settings it was measured with."""
        self.battles = Table(self.path / "battles", ["battle_id"])
        self.measures = Table(self.path / "measures", ["generation_id"])

    def grades(self, goal: str, settings: str) -> Table:
        """Grades of one goal by one judge; `settings` is the hash of what the judge was told."""
        return Table(self.path / "grades" / f"{goal}-{settings}", GRADE_KEY)

    def judged(self, goal: str) -> dict[str, Table]:
        """All grades of one goal, by the hash of what the judge was told."""
        names = [name for name in (self.path / "grades").entries() if name.rpartition("-")[0] == goal]
        return {name.rpartition("-")[2]: self.grades(goal, name.rpartition("-")[2]) for name in sorted(names)}

    def tables(self) -> list[Table]:
        """All tables that are rows on disk."""
        fixed = [table for table in vars(self).values() if isinstance(table, Table)]
        graded = [Table(self.path / "grades" / name, GRADE_KEY) for name in (self.path / "grades").entries()]
        return [*fixed, *graded]

    @property
    def fitting(self) -> Location:
        """Folder of what a fit's workers keep while it runs."""
        return self.path / ".fitting"

    @property
    def moments(self) -> Location:
        """Sums over the rows of `summed`, which is all that a fit needs of them."""
        return self.path / "moments.safetensors"

    @property
    def approximator(self) -> Location:
        return self.path / "approximator.safetensors"

    @property
    def rotation(self) -> Location:
        """The published rotation."""
        return self.path / "published" / "rotation.safetensors"

    def write_fit(self, report: Mapping[str, Any]) -> None:
        """Write fit.json: what is known of the approximator."""
        (self.path / "fit.json").write_text(json.dumps(report, indent=1) + "\n")

    def vector(self, goal: str, method: str) -> Location:
        """File of the vector of a goal and method. Raises `InputError` for an unknown method."""
        return self.path / "vectors" / f"{goal}--{parse_method(method).file_stem}.safetensors"

    @classmethod
    def create(cls, path: Where, experiment: Experiment, effect_settings: Mapping[str, Any]) -> RunFolder:
        """The folder for this experiment, made where it does not exist.

        Raises:
            InputError: no such bucket, a service that does not answer, not a run folder, not writable, or it holds effects
                measured with other settings (names the keys).
        """
        run = cls(path)
        run.path.check()
        if run.path.is_file():
            raise InputError(f"{run.path} is a file; --out needs a folder")
        entries = run.path.entries().keys() - {LOCK}
        if entries and "experiment.toml" not in entries:
            raise InputError(f"{run.path} is not empty and holds no experiment.toml; give --out a new folder or a run folder")
        with run.locked():
            run.check_effect_settings(effect_settings)
            for table in run.tables():
                table.repair()
            (run.path / "experiment.toml").write_text(experiment.to_toml())
            run.update_manifest(versions=versions(), git_commit=git_commit(), seed=experiment.seed)
            run.update_stage("effects", {"settings": dict(effect_settings)})
        return run

    def check_effect_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `InputError` where the folder holds effects measured with other settings; names the keys."""
        before = self.manifest().get("effects", {}).get("settings")
        if before is None or (self.effects.is_empty() and self.baseline.is_empty()):
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
            manifest = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is damaged ({error}); move it away and run again") from error
        if not isinstance(manifest, dict):
            raise InputError(f"{path} holds a {type(manifest).__name__}, not a table; move it away and run again")
        return manifest

    def update_manifest(self, **entries: Any) -> None:
        """Set top-level entries of the manifest."""
        manifest = {**self.manifest(), **entries}
        (self.path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    def update_stage(self, stage: str, entries: Mapping[str, Any]) -> None:
        """Set entries of one stage, keeping its others."""
        self.update_manifest(**{stage: {**self.manifest().get(stage, {}), **entries}})

    def locked(self) -> AbstractContextManager[None]:
        """Hold the folder for one writer; a second one gets an `InputError` at once. See `lock.held`."""
        return held(self.path)


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
