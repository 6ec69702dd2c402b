"""A run as a Ray job on a cluster of several raylets that loses nodes and its driver ends as it would have undisturbed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from ray.job_submission import JobSubmissionClient

from saets.cli import main
from saets.run_folder.store import RunFolder, read_shard
from tests.cluster.machines import Machines, machines, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "model.dtype=float32",
    "model.device=cpu",
    "effects.sources=[{kind='decoder'}, {kind='random', count=200}]",
    "steering.methods=['caa', 'sae_ts']",
    "evaluation.samples=12",
    "execution.actors=2",
)
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "PYTHONPATH": f"{ROOT}:{ROOT}/tests/startup",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def words(out: Path, *more: str) -> list[str]:
    return ["run", "tiny", "--out", str(out), *(word for setting in (*SETTINGS, *more) for word in ("--set", setting))]


@pytest.fixture
def cluster() -> Iterator[Machines]:
    with machines(ENVIRONMENT) as started:
        yield started


def submit(client: JobSubmissionClient, out: Path, folder: Path) -> str:
    quoted = " ".join(f'"{word}"' for word in words(out))
    entrypoint = f"{sys.executable} -m saets {quoted}"

    def submitted() -> str | None:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": str(folder)})
        except RuntimeError as error:  # the head's agent starts after its dashboard
            assert "No available agent" in str(error)
            return None

    return str(until(submitted, "agent"))


class Jobs(JobSubmissionClient):
    """The cluster's jobs; a wait for something that a job does ends when the job has."""

    def until(self, job: str, true: Callable[[], Any], what: str) -> Any:
        def there() -> Any:
            found = true()
            assert found or not self.get_job_status(job).is_terminal(), self.get_job_logs(job)[-5000:]
            return found

        return until(there, what)


def driver(client: JobSubmissionClient, job: str) -> int | None:
    info = client.get_job_info(job).driver_info
    return int(info.pid) if info else None


def rows(out: Path, table: str, key: str) -> pl.DataFrame:
    shards = getattr(RunFolder(out), table).shards()
    frame = pl.concat([pl.from_arrow(read_shard(shard)) for shard in shards]).sort(key)
    assert frame[key].is_unique().all()
    return frame


def assert_same_results(one: Path, two: Path) -> None:
    mine, other = (rows(out, "effects", "vector_id") for out in (one, two))
    assert len(mine) == len(other) == 264
    assert np.array_equal(mine["effect"].to_numpy(), other["effect"].to_numpy())
    # Rows come in another order, so a fit differs in its last bits, and with them the ids of what is made from it.
    place = ["goal", "method", "scale", "prompt", "sample", "completion"]
    texts = [rows(out, "generations", "generation_id").select(place).sort(place) for out in (one, two)]
    assert texts[0].equals(texts[1])
    scores: list[Any] = [pl.read_parquet(out / "results.parquet") for out in (one, two)]
    assert scores[0].equals(scores[1])


def test_a_job_that_loses_nodes_and_its_driver_ends_with_the_results_of_an_undisturbed_run(
    cluster: Machines, tmp_path: Path
) -> None:
    out, undisturbed, empty = tmp_path / "job", tmp_path / "undisturbed", tmp_path / "empty"
    empty.mkdir()
    client = Jobs(cluster.address)
    first, _ = cluster.add(), cluster.add()
    job = submit(client, out, empty)

    client.until(job, lambda: list(out.glob("effects/baseline/*.parquet")), "baseline")
    first.kill()
    third = cluster.add()
    client.until(job, lambda: list(out.glob("effects/*.parquet")), "effects")
    os.kill(until(lambda: driver(client, job), "driver"), signal.SIGKILL)
    until(lambda: client.get_job_status(job).is_terminal(), "end of the first job")
    assert not (out / "results.parquet").exists()

    job = submit(client, out, empty)
    client.until(job, lambda: list(out.glob("vectors/*.safetensors")), "vectors")
    third.kill()
    assert main(words(undisturbed, "execution.actors=1")) == 0
    until(lambda: client.get_job_status(job).is_terminal(), "end of the second job")
    assert client.get_job_status(job) == "SUCCEEDED", client.get_job_logs(job)[-3000:]
    assert_same_results(out, undisturbed)
