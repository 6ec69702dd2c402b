"""The fit as a Ray Train job on planted rows: weights, solvers, workers that come and go."""

from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from saets.approximator import Moments, RidgePath
from saets.config import Execution, Fit
from saets.distributed.cluster import Cluster
from saets.distributed.fit import fit
from saets.errors import InputError
from saets.held_out import is_held_out
from saets.stages.fit import fit_settings

pytestmark = pytest.mark.ray

D_MODEL, D_SAE, SEED = 8, 12, 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(Execution()) as cluster:
        cluster.connect()
        yield cluster


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

    def tables(self) -> Iterator[pa.Table]:
        for part in np.array_split(np.arange(len(self.X)), 3):
            yield pa.table(
                {
                    "vector_id": [self.ids[i] for i in part],
                    "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(self.X[part]),
                    "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(self.Y[part]),
                    "standard_error": np.full(len(part), 0.1),
                    "calibration": np.where(self.capped[part], "capped", "ok"),
                }
            )


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_capped_rows_count_as_much_as_the_setting_says(cluster: Cluster, weight: float) -> None:
    planted = Planted.of(61, 0.3)
    found = fit(planted.tables(), Fit(capped_weight=weight, penalties=(0.1,)), cluster, seed=SEED)
    weights = torch.from_numpy(np.where(planted.capped, weight, 1.0))
    expected = Moments(D_MODEL, D_SAE)
    expected.add(torch.from_numpy(planted.X), torch.from_numpy(planted.Y), weights)
    assert torch.allclose(found.approximator.M, RidgePath(expected).fit(0.1).M, atol=1e-5)
    counted = ~planted.capped if weight == 0 else np.ones(61, bool)
    assert found.report["rows_capped"] == 16
    assert found.report["rows_held_out"] == (counted & planted.held_out).sum()
    assert found.report["rows_train"] == (counted & ~planted.held_out).sum()


def test_settings_that_change_nothing_do_not_make_an_old_fit_invalid() -> None:
    assert fit_settings(Fit()) == {"penalties": list(Fit().penalties), "held_out": 0.1}
    assert fit_settings(Fit(workers=2, max_failures=0, epochs=3)) == fit_settings(Fit())
    assert fit_settings(Fit(capped_weight=0.5)) == {**fit_settings(Fit()), "capped_weight": 0.5}
    assert fit_settings(Fit(solver="adam")).keys() == {"held_out", "solver", "learning_rate", "batch_size", "epochs"}


def test_too_few_rows_are_counted_and_the_penalty_explained(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="0 held out, of which at least 2 and 1 are needed; .* fewer rows than the 8 dimensions"):
        fit(Planted.of(3, 0.1).tables(), Fit(held_out=1e-9), cluster, seed=SEED)
    with pytest.raises(InputError, match="fit.capped_weight = 0 leaves out 1 capped ones"):
        fit(Planted.of(3, 0.1).tables(), Fit(held_out=1e-9, capped_weight=0), cluster, seed=SEED)


ADAM = Fit(solver="adam", learning_rate=0.05, batch_size=32, epochs=60)
"""Settings with which Adam comes to rest on these rows."""


def test_ridge_and_adam_both_find_a_planted_map_and_agree(cluster: Cluster) -> None:
    planted = Planted.of(301, 0.0)
    ridge = fit(planted.tables(), Fit(penalties=(0.0,)), cluster, seed=SEED)
    adam = fit(planted.tables(), ADAM, cluster, seed=SEED)
    for found in (ridge, adam):
        assert np.allclose(found.approximator.M, planted.M, atol=2e-3)
        assert np.allclose(found.approximator.b, planted.b, atol=2e-3)
        assert found.report["held_out"]["r2"] > 0.9999
    assert ridge.report["held_out"].keys() == adam.report["held_out"].keys()
    losses = adam.report["mse_by_epoch"]
    assert len(losses) == ADAM.epochs
    assert losses[-1] < losses[0] / 1000


def test_adam_weighs_capped_rows_too(cluster: Cluster) -> None:
    planted = Planted.of(80, 0.0)
    planted.Y[planted.capped] = 7
    settings = ADAM.model_copy(update={"capped_weight": 0.0, "epochs": 200})
    found = fit(planted.tables(), settings, cluster, seed=SEED)
    assert np.allclose(found.approximator.M, planted.M, atol=1e-2)


@pytest.mark.parametrize("solver", ["ridge", "adam"])
def test_two_workers_fit_what_one_process_fits_and_lose_no_row(cluster: Cluster, solver: str) -> None:
    planted = Planted.of(301, 0.3)
    settings = Fit(solver=solver, learning_rate=0.02, batch_size=64, epochs=5)
    alone = fit(planted.tables(), settings, cluster, seed=SEED)
    two = fit(planted.tables(), settings.model_copy(update={"workers": 2}), cluster, seed=SEED)
    assert two.report["rows_train"] + two.report["rows_held_out"] == 301
    assert torch.allclose(alone.approximator.M, two.approximator.M, atol=1e-5)
    assert torch.allclose(alone.approximator.b, two.approximator.b, atol=1e-5)
    assert two.report["held_out"]["mse"] == pytest.approx(alone.report["held_out"]["mse"], rel=1e-4)


def test_after_a_worker_is_killed_adam_goes_on_to_the_result_of_an_undisturbed_fit(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of one of two workers after an epoch's checkpoint. Equal but for the order in which float32 sums are formed."""
    planted = Planted.of(301, 0.3)
    settings = Fit(solver="adam", learning_rate=0.01, batch_size=32, epochs=20)
    undisturbed = fit(planted.tables(), settings, cluster, seed=SEED)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed: list[int] = []

    def kill() -> None:
        deadline, seen = time.monotonic() + 120, set[str]()
        while time.monotonic() < deadline and len(seen) < 3:  # by then Ray Train has taken note of the first
            seen |= {path.name for path in tmp_path.glob("saets-fit-*/fit/checkpoint_*")}
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if not killed and "RayTrainWorker" in " ".join(process.cmdline()):
                killed.append(process.pid)
                os.kill(process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = fit(planted.tables(), settings.model_copy(update={"workers": 2}), cluster, seed=SEED)
    killer.join()
    assert killed
    assert 0 < found.report["resumed_at_epoch"] < settings.epochs
    assert len(found.report["mse_by_epoch"]) == settings.epochs
    assert found.report["mse_by_epoch"] == pytest.approx(undisturbed.report["mse_by_epoch"], rel=1e-3)
    assert torch.allclose(found.approximator.M, undisturbed.approximator.M, atol=1e-4)
