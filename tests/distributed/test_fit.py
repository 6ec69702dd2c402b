"""The fit as a Ray Train job on planted rows: weights, solvers, workers that come and go."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch

from saets.distributed.cluster import Cluster
from saets.distributed.fit import FitResult, Outcome, fit, train
from saets.distributed.shards import Shards
from saets.distributed.together import agreeing
from saets.errors import InputError
from saets.experiment.config import Execution, Fit
from saets.files.storage import Location, locate
from saets.fit.approximator import Moments, RidgePath
from saets.fit.held_out import is_held_out
from saets.run_folder.measured import MeasuredRows
from saets.run_folder.store import Table
from saets.stages.fit import fit_settings

pytestmark = pytest.mark.ray

D_MODEL, D_SAE, SEED = 8, 12, 3


@pytest.fixture(scope="module")
def cluster(bucket: str) -> Iterator[Cluster]:
    """Its processes know the bucket from their environment."""
    with Cluster(Execution()) as cluster:
        cluster.connect()
        yield cluster


@pytest.fixture
def folder(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


@dataclasses.dataclass
class Planted:
    """Rows y = x M + b with noise; every fourth one is capped."""

    X: np.ndarray
    Y: np.ndarray
    ids: list[str]
    M: np.ndarray
    b: np.ndarray

    @classmethod
    def of(cls, rows: int, noise: float) -> Planted:
        draw = np.random.default_rng(5)
        M, b = draw.normal(size=(D_MODEL, D_SAE)).astype(np.float32), draw.normal(size=D_SAE).astype(np.float32)
        X = draw.normal(size=(rows, D_MODEL)).astype(np.float32)
        X /= np.linalg.norm(X, axis=1, keepdims=True)
        Y = X @ M + b + noise * draw.normal(size=(rows, D_SAE)).astype(np.float32)
        return cls(X, Y.astype(np.float32), [f"v{i}" for i in range(rows)], M, b)

    @property
    def capped(self) -> np.ndarray:
        return np.arange(len(self.X)) % 4 == 0

    @property
    def held_out(self) -> np.ndarray:
        return is_held_out(self.ids, SEED, 0.1)

    def write(self, place: Location) -> MeasuredRows:
        """Three shards."""
        table = Table(place / "effects", ["vector_id"])
        for part in np.array_split(np.arange(len(self.X)), 3):
            table.write(
                pa.table(
                    {
                        "vector_id": [self.ids[i] for i in part],
                        "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(self.X[part]),
                        "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(self.Y[part]),
                        "standard_error": np.full(len(part), 0.1),
                        "calibration": np.where(self.capped[part], "capped", "ok"),
                    }
                )
            )
        return MeasuredRows.of([table])

    def fit(self, settings: Fit, place: Location, cluster: Cluster, **others: Any) -> FitResult:
        """In a run folder that the fit leaves as it was."""
        rows = self.write(place)
        found = fit(rows, settings, cluster, place / ".fitting", seed=SEED, **others)
        assert list(place.entries()) == ["effects"]
        return found


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_capped_rows_count_as_much_as_the_setting_says(cluster: Cluster, folder: Location, weight: float) -> None:
    planted = Planted.of(61, 0.3)
    found = planted.fit(Fit(capped_weight=weight, penalties=(0.1,)), folder / uuid.uuid4().hex, cluster)
    weights = torch.from_numpy(np.where(planted.capped, weight, 1.0))
    expected = Moments(D_MODEL, D_SAE)
    expected.add(torch.from_numpy(planted.X), torch.from_numpy(planted.Y), weights)
    assert torch.allclose(found.approximator.M, RidgePath(expected).fit(0.1).M, atol=1e-5)
    counted = ~planted.capped if weight == 0 else np.ones(61, bool)
    assert found.report["rows_capped"] == 16
    assert found.report["rows_held_out"] == (counted & planted.held_out).sum()
    assert found.report["rows_train"] == (counted & ~planted.held_out).sum()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_workers_fits_every_row_and_those_given_as_moments(
    cluster: Cluster, folder: Location, workers: int
) -> None:
    planted, here = Planted.of(300, 0.3), np.arange(300) < 120
    apart = here | planted.held_out
    summed, expected = Moments(D_MODEL, D_SAE), Moments(D_MODEL, D_SAE)
    summed.add(*(torch.from_numpy(rows[~apart]) for rows in (planted.X, planted.Y)))
    expected.add(torch.from_numpy(planted.X), torch.from_numpy(planted.Y))
    some = Planted(planted.X[apart], planted.Y[apart], [planted.ids[i] for i in np.flatnonzero(apart)], planted.M, planted.b)
    place = folder / uuid.uuid4().hex
    alone = planted.fit(Fit(penalties=(0.1,)), folder / uuid.uuid4().hex, cluster)
    found = some.fit(Fit(penalties=(0.1,), workers=workers), place, cluster, summed=summed)
    assert torch.allclose(found.approximator.M, RidgePath(expected).fit(0.1).M, atol=1e-5)
    assert torch.allclose(found.approximator.b, alone.approximator.b, atol=1e-5)
    assert (found.report["rows_train"], found.report["rows_held_out"]) == ((~planted.held_out).sum(), planted.held_out.sum())
    assert found.report["held_out"]["mse"] == pytest.approx(alone.report["held_out"]["mse"], rel=1e-5)
    assert found.report["held_out"]["cosine_mean_effect"] == pytest.approx(
        alone.report["held_out"]["cosine_mean_effect"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "sizes", "said"),
    [
        (Fit(solver="adam"), (D_MODEL, D_SAE), "fit.solver = 'adam' needs every row.* give --measure"),
        (Fit(capped_weight=0.5), (D_MODEL, D_SAE), "fit.capped_weight is 0.5.* give --measure"),
        (Fit(), (D_MODEL, D_SAE + 1), r"\(8, 13\).* give --measure"),
    ],
)
def test_moments_that_cannot_be_fitted_with_the_rows_are_refused(
    cluster: Cluster, folder: Location, settings: Fit, sizes: tuple[int, int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Planted.of(30, 0.1).fit(settings, folder / uuid.uuid4().hex, cluster, summed=Moments(*sizes))


def test_settings_that_change_nothing_do_not_make_an_old_fit_invalid() -> None:
    assert fit_settings(Fit()) == {"penalties": list(Fit().penalties), "held_out": 0.1}
    assert fit_settings(Fit(workers=2, max_failures=0, epochs=3)) == fit_settings(Fit())
    assert fit_settings(Fit(capped_weight=0.5)) == {**fit_settings(Fit()), "capped_weight": 0.5}
    assert fit_settings(Fit(solver="adam")).keys() == {"held_out", "solver", "learning_rate", "batch_size", "epochs"}


def test_too_few_rows_are_counted_and_the_penalty_explained(cluster: Cluster, folder: Location) -> None:
    with pytest.raises(InputError, match="0 held out, of which at least 2 and 1 are needed; .* fewer rows than the 8 dimensions"):
        Planted.of(3, 0.1).fit(Fit(held_out=1e-9), folder / uuid.uuid4().hex, cluster)
    with pytest.raises(InputError, match="fit.capped_weight = 0 leaves out 1 capped ones"):
        Planted.of(3, 0.1).fit(Fit(held_out=1e-9, capped_weight=0), folder / uuid.uuid4().hex, cluster)


ADAM = Fit(solver="adam", learning_rate=0.05, batch_size=32, epochs=60)
"""Settings with which Adam comes to rest on these rows."""


def test_ridge_and_adam_both_find_a_planted_map_and_agree(cluster: Cluster, folder: Location) -> None:
    planted = Planted.of(301, 0.0)
    ridge = planted.fit(Fit(penalties=(0.0,)), folder / uuid.uuid4().hex, cluster)
    adam = planted.fit(ADAM, folder / uuid.uuid4().hex, cluster)
    for found in (ridge, adam):
        assert np.allclose(found.approximator.M, planted.M, atol=2e-3)
        assert np.allclose(found.approximator.b, planted.b, atol=2e-3)
        assert found.report["held_out"]["r2"] > 0.9999
    assert ridge.report["held_out"].keys() == adam.report["held_out"].keys()
    losses = adam.report["mse_by_epoch"]
    assert len(losses) == ADAM.epochs
    assert losses[-1] < losses[0] / 1000


def test_adam_weighs_capped_rows_too(cluster: Cluster, folder: Location) -> None:
    planted = Planted.of(80, 0.0)
    planted.Y[planted.capped] = 7
    settings = ADAM.model_copy(update={"capped_weight": 0.0, "epochs": 200})
    found = planted.fit(settings, folder / uuid.uuid4().hex, cluster)
    assert np.allclose(found.approximator.M, planted.M, atol=1e-2)


def test_after_a_worker_is_killed_adam_goes_on_to_the_result_of_an_undisturbed_fit(
    cluster: Cluster, folder: Location, tmp_path: Path
) -> None:
    """SIGKILL of one of two workers in its third epoch. Equal but for the order in which float32 sums are formed."""
    planted, marker = Planted.of(301, 0.3), tmp_path / "killed"
    settings = Fit(solver="adam", learning_rate=0.01, batch_size=32, epochs=6)
    undisturbed = planted.fit(settings, folder / "alone", cluster)

    def dying(config: dict[str, Any]) -> Outcome | str | None:
        report = ray.train.report

        def report_and_die(metrics: dict[str, Any], **given: Any) -> None:
            report(metrics, **given)
            if metrics["epoch"] == 3 and ray.train.get_context().get_world_rank() == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        with mock.patch.object(ray.train, "report", report_and_die):
            return train(config)

    found = planted.fit(settings.model_copy(update={"workers": 2}), folder / "two", cluster, loop=dying)
    assert marker.exists()
    assert found.report["rows_train"] + found.report["rows_held_out"] == 301
    assert 0 < found.report["resumed_at_epoch"] <= 3
    assert len(found.report["mse_by_epoch"]) == settings.epochs
    assert found.report["mse_by_epoch"] == pytest.approx(undisturbed.report["mse_by_epoch"], rel=1e-3)
    assert torch.allclose(found.approximator.M, undisturbed.approximator.M, atol=1e-4)


def test_a_run_folder_in_a_bucket_is_read_by_any_node_and_keeps_the_checkpoints(
    cluster: Cluster, folder: Location, remote: Location
) -> None:
    planted, settings = Planted.of(301, 0.3), Fit(solver="adam", learning_rate=0.02, epochs=2)
    alone = planted.fit(settings, folder, cluster)
    there = planted.fit(settings.model_copy(update={"workers": 1, "max_failures": 0}), remote, cluster)
    assert torch.allclose(alone.approximator.M, there.approximator.M, atol=1e-5)
    assert not Shards(planted.write(folder)).supports_distributed_reads
    assert Shards(planted.write(remote)).supports_distributed_reads


def spoiled() -> Planted:
    """Rows of which three that count are not finite, each in another way, and one that does not count."""
    planted = Planted.of(61, 0.3)
    for row, bad in ((1, np.nan), (2, np.inf), (59, -np.inf), (0, np.nan)):
        planted.Y[row, row % D_SAE] = bad
    return planted


@pytest.mark.parametrize("solver", ["ridge", "adam"])
def test_effects_that_are_not_finite_are_counted_and_named(cluster: Cluster, folder: Location, solver: str) -> None:
    with pytest.raises(InputError, match=r"3 of 45 measured effects hold NaN or infinity \(v1, v2, v59\); measure those"):
        spoiled().fit(Fit(solver=solver, capped_weight=0), folder, cluster)


def test_what_one_worker_finds_wrong_all_raise_and_rows_that_are_wrong_end_the_job_at_once(
    cluster: Cluster, folder: Location, tmp_path: Path
) -> None:
    def counted(config: dict[str, Any]) -> Outcome | str | None:
        rank = ray.train.get_context().get_world_rank()
        try:
            with agreeing():
                if rank == 1:
                    raise InputError("wrong")
        except InputError as error:
            with (tmp_path / f"worker-{rank}").open("a") as file:
                file.write(f"{error}.")
        return train(config)

    with pytest.raises(InputError, match="3 of 45 measured effects hold NaN or infinity"):
        spoiled().fit(Fit(workers=2, max_failures=3, capped_weight=0), folder, cluster, loop=counted)
    raised = {path.name: path.read_text() for path in tmp_path.glob("worker-*")}
    assert raised == {"worker-0": "wrong.", "worker-1": "wrong."}, "each worker began once"


def test_no_room_on_disk_for_the_rows_held_out_ends_the_job(cluster: Cluster, folder: Location) -> None:
    def full(config: dict[str, Any]) -> Outcome | str | None:
        with mock.patch.object(tempfile, "TemporaryFile", functools.partial(open, "/dev/full", "r+b")):
            return train(config)

    with pytest.raises(InputError, match="cannot keep rows in .* set TMPDIR"):
        Planted.of(61, 0.3).fit(Fit(), folder, cluster, loop=full)


def test_batches_of_a_few_rows_fit_what_one_batch_fits(cluster: Cluster, folder: Location) -> None:
    planted = Planted.of(301, 0.3)
    whole = planted.fit(Fit(), folder / uuid.uuid4().hex, cluster)

    def small(config: dict[str, Any]) -> Outcome | str | None:
        with mock.patch("saets.distributed.fit.BATCH_BYTES", 7 * 2 * D_SAE):
            return train(config)

    few = planted.fit(Fit(), folder / uuid.uuid4().hex, cluster, loop=small)
    assert torch.allclose(few.approximator.M, whole.approximator.M, atol=1e-5)
    assert few.report["held_out"]["mse"] == pytest.approx(whole.report["held_out"]["mse"], rel=1e-5)


def test_a_shard_that_is_gone_is_named(cluster: Cluster, folder: Location) -> None:
    rows = Planted.of(61, 0.3).write(folder)
    rows.parts[1].shard.delete()
    with pytest.raises(InputError, match=f"cannot read {rows.parts[1].shard}"):
        fit(rows, Fit(), cluster, folder / ".fitting", seed=SEED)


def test_adam_in_a_folder_that_a_workers_node_does_not_see_says_what_to_do(
    cluster: Cluster, folder: Location, tmp_path: Path
) -> None:
    def elsewhere(config: dict[str, Any]) -> Outcome | str | None:
        return train({**config, "state": locate(tmp_path / "nowhere")})

    settings = Fit(solver="adam", workers=1, epochs=1)
    with pytest.raises(InputError, match="does not see .*nowhere, .* or take fit.solver = ridge"):
        Planted.of(61, 0.3).fit(settings, folder, cluster, loop=elsewhere)
