"""Nothing written is lost: a run that is killed, stopped, out of disk or damaged ends with the rows of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from saets.cli import main
from saets.distributed.cluster import Cluster
from saets.effects.pending import Pending
from saets.effects.worker import EffectWorker, Measurement
from saets.experiment.config import BASELINE
from saets.experiment.loading import effect_settings, load_experiment
from saets.files.storage import Where
from saets.run_folder.rows import baseline_rows, effect_rows, shared_baseline
from saets.run_folder.store import RunFolder, read_shard

pytestmark = pytest.mark.ray

SOURCES = "effects.sources=[{kind='decoder'}, {kind='random', count=300}]"
SETTINGS = ("model.dtype=float32", "model.device=cpu", "execution.rows=24", "execution.actors=1", SOURCES)
VECTORS = 64 + 300


def command(out: Path) -> list[str]:
    return ["effects", "tiny", "--out", str(out), *(word for setting in SETTINGS for word in ("--set", setting))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(load_experiment("tiny").execution) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Every row, measured in this process."""
    experiment = load_experiment("tiny", SETTINGS)
    run = RunFolder.create(tmp_path_factory.mktemp("undisturbed") / "run", experiment, effect_settings(experiment))
    found = [one for one in EffectWorker(experiment).measure(list(Pending(experiment, 32))) if isinstance(one, Measurement)]
    run.baseline.write(baseline_rows([one for one in found if one.item.source == BASELINE]))
    run.effects.write(effect_rows([one for one in found if one.item.source != BASELINE], shared_baseline(run.baseline)))
    return rows(run.path)


def rows(out: Where) -> pl.DataFrame:
    """The rows of all shards, which must hold each vector once."""
    frame = pl.concat([pl.from_arrow(read_shard(shard)) for shard in RunFolder(out).effects.shards()]).sort("vector_id")
    assert frame["vector_id"].is_unique().all()
    return frame


def assert_same_rows(one: pl.DataFrame, two: pl.DataFrame) -> None:
    assert len(one) == len(two) == VECTORS
    for name in ("vector", "effect"):
        assert np.array_equal(one[name].to_numpy(), two[name].to_numpy())
    plain = [name for name in one.columns if name not in ("vector", "effect")]
    assert one.select(plain).equals(two.select(plain))


def interrupted(out: Path, there: str, sent: signal.Signals) -> tuple[int, str]:
    """Run until a file of that pattern is newly there, send the signal, and give the exit code and what was said."""
    before = set(out.glob(there))
    process = subprocess.Popen(
        [sys.executable, "-m", "saets", *command(out)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not set(out.glob(there)) - before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        if sent == signal.SIGKILL:
            os.killpg(process.pid, sent)
        else:
            process.send_signal(sent)
        return process.wait(timeout=120), process.communicate()[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_run_killed_stopped_and_damaged_ends_with_the_rows_of_an_undisturbed_one(
    cluster: Cluster, undisturbed: pl.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    run = RunFolder(out)
    interrupted(out, "effects/*.parquet", signal.SIGKILL)
    killed = run.effects.ids()
    assert 0 < len(killed) < VECTORS
    code, said = interrupted(out, "effects/*.parquet", signal.SIGINT)
    assert code == 130, said
    assert "run the same command again to go on from here" in said
    stopped = run.effects.ids()
    assert stopped > killed
    damaged = out / "effects" / run.effects.shards()[0].name
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert main(command(out)) == 0
    assert f"{damaged.name} cannot be read" in caplog.text
    assert damaged.with_suffix(".damaged").is_file()
    assert_same_rows(rows(out), undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(where)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    cluster: Cluster, undisturbed: pl.DataFrame, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(bytes(2**20 - 60 * 2**10))
    assert main(command(out)) == 2
    said = capsys.readouterr().err
    assert "No space left on device; make room or choose another --out, then run the same command again" in said
    filler.unlink()
    assert main(command(out)) == 0
    assert_same_rows(rows(out), undisturbed)
