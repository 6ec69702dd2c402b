"""The fit as a Ray Train job on planted rows: weights, solvers, workers that come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
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
    assert fit_settings(Fit(workers=2)) == fit_settings(Fit())
    assert fit_settings(Fit(capped_weight=0.5)) == {**fit_settings(Fit()), "capped_weight": 0.5}


def test_too_few_rows_are_counted_and_the_penalty_explained(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="0 held out, of which at least 2 and 1 are needed; .* fewer rows than the 8 dimensions"):
        fit(Planted.of(3, 0.1).tables(), Fit(held_out=1e-9), cluster, seed=SEED)
    with pytest.raises(InputError, match="fit.capped_weight = 0 leaves out 1 capped ones"):
        fit(Planted.of(3, 0.1).tables(), Fit(held_out=1e-9, capped_weight=0), cluster, seed=SEED)
