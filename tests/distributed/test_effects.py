"""Measuring on a real Ray session: vectors that break their worker or its process cost nothing but themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from saets.distributed.cluster import Cluster
from saets.distributed.effects import EffectActor, _batch_row, _results, _unpacked, measure
from saets.distributed.nodes import versions
from saets.distributed.rollcall import Board, answering
from saets.effects.pending import Pending
from saets.effects.worker import EffectWorker, Failure, Measurement, baseline_items
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.records import VectorItem
from saets.run_folder.rows import items_of

pytestmark = pytest.mark.ray

ILL, DEADLY = 5, 11
"""Decoder rows that raise an error, and that end the process."""


class Fragile(EffectActor):
    """Breaks on two vectors."""

    def measure(self, items: Sequence[VectorItem]) -> list[Measurement | Failure]:
        if any((item.source, item.index) == ("decoder", DEADLY) for item in items):
            os._exit(9)
        measure_well = self.worker.measure

        def measure_badly(some: Sequence[VectorItem]) -> list[Measurement | Failure]:
            if any(item.index == ILL for item in some):
                raise ArithmeticError("this vector is ill")
            return measure_well(some)

        self.worker.measure = measure_badly  # type: ignore[method-assign, assignment]
        try:
            return super().measure(items)
        finally:
            self.worker.measure = measure_well  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    """Vectors in batches of four."""
    sources = "effects.sources=[{ stop = 14 }]"
    return load_experiment("tiny", ["model.dtype=float32", "model.device=cpu", "execution.rows=48", sources])


@pytest.fixture(scope="module")
def cluster(experiment: Experiment) -> Iterator[Cluster]:
    with Cluster(experiment.execution) as cluster:
        cluster.connect()
        yield cluster


def without_baseline(experiment: Experiment) -> Pending:
    """The vectors alone."""
    return Pending(experiment, 32, blocks=[item.vector_id for item in baseline_items(experiment, 32)])


@pytest.fixture
def tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose process ended is not tried again; how often it is makes no other difference."""
    monkeypatch.setattr("saets.distributed.effects.TASK_RETRIES", 0)


def test_a_vector_that_raises_and_one_that_kills_its_process_fail_alone(
    cluster: Cluster, experiment: Experiment, tried_once: None
) -> None:
    pending = without_baseline(experiment)
    items = list(pending)
    found = {r.item.index: r for results, _ in measure(pending, experiment, cluster, actor=Fragile) for r in results}
    assert sorted(found) == list(range(14))
    failures = {index: result.reason for index, result in found.items() if isinstance(result, Failure)}
    assert failures == {
        ILL: "ArithmeticError: this vector is ill",
        DEADLY: "the worker process ended each time it was measured",
    }
    worker = EffectWorker(experiment)
    for expected in worker.measure(items):
        result = found[expected.item.index]
        if isinstance(result, Measurement):
            assert isinstance(expected, Measurement)
            assert np.array_equal(result.mean, expected.mean)


def test_a_stream_of_vectors_that_breaks_off_goes_on_with_what_is_left(
    cluster: Cluster, experiment: Experiment, tmp_path: Path, tried_once: None
) -> None:
    """In the first pass a batch is lost, and so is the row that ends the vectors."""
    deaths, most = tmp_path / "deaths", 2

    class EndsEarly(EffectActor):
        def __call__(self, batch: pa.Table) -> pa.Table:
            last = not batch.column("items")[0].is_valid or any(
                item.index == DEADLY for item in items_of(_unpacked(batch, "items"))
            )
            if last and len(deaths.read_text()) < most:
                with deaths.open("a") as file:
                    file.write(".")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    deaths.touch()
    pending = without_baseline(experiment)
    expected = EffectWorker(experiment).measure(list(pending))
    found = {r.item.index: r for results, _ in measure(pending, experiment, cluster, actor=EndsEarly) for r in results}
    assert len(deaths.read_text()) == most
    assert len(found) == len(expected) == 14
    for one in expected:
        result = found[one.item.index]
        assert isinstance(result, Measurement)
        assert isinstance(one, Measurement)
        assert np.array_equal(result.mean, one.mean)


def test_every_item_has_one_result_and_the_worker_tells_its_shape(cluster: Cluster, experiment: Experiment) -> None:
    pending = Pending(experiment, 32)
    wanted = sorted(item.vector_id for item in pending)
    assert len(wanted) == 14 + experiment.effects.baseline_blocks
    batches = list(measure(pending, experiment, cluster, rows=24))
    ids = [result.item.vector_id for results, _ in batches for result in results]
    assert sorted(ids) == wanted
    assert len(pending) == 0
    shapes = {(worker or {})["rows_per_step"] for _, worker in batches}
    assert shapes == {24}


def test_standard_errors_of_features_travel() -> None:
    experiment = load_experiment("tiny", ["model.device=cpu", "effects.standard_errors=features", "effects.sources=[{stop=2}]"])
    items = list(without_baseline(experiment))
    found = _results(EffectActor(experiment.model_dump_json(), None)(_batch_row(items)))
    assert [result.item.index for result in found] == [0, 1]
    for result in found:
        assert isinstance(result, Measurement)
        assert result.feature_error_variance is not None
        assert result.feature_error_variance.mean() == pytest.approx(result.error_variance, rel=1e-4)


class Elsewhere(EffectActor):
    """Runs with another torch."""

    def __init__(self, experiment: str, rows: int | None, board: Board | None = None) -> None:
        with mock.patch("saets.distributed.nodes.versions", lambda: {**versions(), "torch": "2.6.0"}):
            super().__init__(experiment, rows, board)


def test_an_actor_with_other_packages_than_the_driver_does_no_work(cluster: Cluster, experiment: Experiment) -> None:
    with pytest.raises(InputError, match=r"has torch 2\.6\.0, .* has 2\..*; give every node the same image"):
        list(measure(without_baseline(experiment), experiment, cluster, actor=Elsewhere))


class Idle(EffectActor):
    """Gets no vector to measure, so it loads nothing."""

    def __init__(self, experiment: str, rows: int | None, board: Board | None = None) -> None:
        answering(board)


def test_sources_that_can_no_longer_be_read_end_the_stage_with_the_reason(
    cluster: Cluster, experiment: Experiment, tmp_path: Path
) -> None:
    vectors = tmp_path / "vectors.safetensors"
    save_file({"v": torch.randn(3, 32)}, vectors)
    changed = load_experiment("tiny", ["model.device=cpu", f"effects.sources=[{{kind='file', path='{vectors}'}}]"])
    pending = without_baseline(changed)
    vectors.unlink()
    with pytest.raises(InputError, match=r"the vectors could not be made: effects.sources names .*vectors.safetensors"):
        list(measure(pending, changed, cluster, actor=Idle))
