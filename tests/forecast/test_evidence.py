"""The leverage of a vector and vectors left out of a fit, against fits made anew without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator, Moments, ridge
from saets.fit.leverage import Leverage, left_out
from saets.forecast.evidence import evidence, left_out_effects
from saets.run_folder.fitted import Fitted, fitted
from saets.run_folder.store import RunFolder
from saets.vector.vector import SteeringVector

PENALTY = 0.3


@pytest.fixture(scope="module")
def experiment(measured: RunFolder) -> Experiment:
    """The tiny experiment, with which measured effects come; a quarter of them is held out."""
    changes = [f"effects.shipped={measured.path}", "fit.held_out=0.25", "model.dtype=float32", "model.device=cpu"]
    return load_experiment("tiny", changes)


@pytest.fixture
def nowhere(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "nothing")


@pytest.fixture(scope="module")
def rows(measured: RunFolder) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    frame = measured.effects.read()
    assert frame is not None
    return frame["vector"].to_numpy().astype(np.float64), frame["effect"].to_numpy().astype(np.float64)


def solved(x: NDArray[np.float64], y: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Ridge with an unpenalised intercept at an absolute penalty, by the normal equations of (1, x)."""
    design = np.column_stack([np.ones(len(x)), x])
    penalised = np.diag([0.0] + [penalty] * x.shape[1])
    return np.linalg.solve(design.T @ design + penalised, design.T @ y)


def test_leverage_is_the_quadratic_form_of_the_penalised_design() -> None:
    draw = np.random.default_rng(0)
    x, new = draw.standard_normal((30, 5)), draw.standard_normal((3, 5))
    centred = x - x.mean(0)
    absolute = PENALTY * np.trace(centred.T @ centred) / 5
    design = np.column_stack([np.ones(30), x])
    inverse = np.linalg.inv(design.T @ design + np.diag([0.0] + [absolute] * 5))
    leverage = Leverage(30.0, torch.from_numpy(x.sum(0)), torch.from_numpy(x.T @ x), PENALTY)
    for vectors in (x[:3], new):
        expected = [np.append(1, vector) @ inverse @ np.append(1, vector) for vector in vectors]
        assert leverage.of(torch.from_numpy(vectors)).tolist() == pytest.approx(expected)


def test_a_row_left_out_has_the_leverage_of_a_fit_without_it() -> None:
    x = np.random.default_rng(1).standard_normal((20, 4))
    total, gram = torch.from_numpy(x.sum(0)), torch.from_numpy(x.T @ x)
    inside = left_out(Leverage(20.0, total, gram, 1e-12).of(torch.from_numpy(x[:1])), torch.ones(1))
    rest = Leverage(19.0, torch.from_numpy(x[1:].sum(0)), torch.from_numpy(x[1:].T @ x[1:]), 1e-12)
    assert inside.item() == pytest.approx(rest.of(torch.from_numpy(x[:1])).item(), rel=1e-5)


def test_a_direction_that_no_vector_of_the_fit_has_is_far_outside() -> None:
    x = np.random.default_rng(2).standard_normal((50, 6))
    x[:, 5] = 0
    leverage = Leverage(50.0, torch.from_numpy(x.sum(0)), torch.from_numpy(x.T @ x), 1e-3)
    unseen, seen = leverage.of(torch.eye(6)[[5, 0]]).tolist()
    assert unseen > 100 * seen


def test_the_fit_made_in_this_process_is_the_ridge_of_all_rows_and_says_how_it_was_chosen(
    experiment: Experiment, nowhere: RunFolder, rows: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    found = fitted(nowhere, experiment)
    assert found.here == "40 measured vectors that come with tiny"
    assert (found.report["rows_train"] + found.report["rows_held_out"], found.report["solver"]) == (40, "ridge")
    moments = Moments(32, 64)
    moments.add(*(torch.from_numpy(part).float() for part in rows))
    expected = ridge(moments, found.report["penalty"])
    assert torch.allclose(found.approximator.M, expected.M, atol=1e-5)
    assert torch.allclose(found.approximator.b, expected.b, atol=1e-5)
    errors = found.report["held_out_mse_by_penalty"]
    assert (
        errors[f"{found.report['penalty']:.6g}"]
        == min(errors.values())
        == pytest.approx(found.report["held_out"]["mse"], rel=1e-4)
    )
    assert not nowhere.path.is_folder()


def test_errors_of_vectors_left_out_are_those_of_fits_without_them(
    experiment: Experiment, nowhere: RunFolder, measured: RunFolder, rows: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    fit = fitted(nowhere, experiment)
    found = evidence(nowhere, experiment, fit)
    x, y = rows
    centred = x - x.mean(0)
    absolute = fit.report["penalty"] * np.trace(centred.T @ centred) / 32
    expected = []
    for i in range(40):
        rest = np.arange(40) != i
        beta = solved(x[rest], y[rest], absolute)
        predicted = np.append(1, x[i]) @ beta
        cosine = predicted @ y[i] / np.linalg.norm(predicted) / np.linalg.norm(y[i])
        expected.append((np.square(y[i] - predicted).sum(), np.square(y[i] - y.mean(0)).sum(), cosine))
    assert len(found.leverages) == fit.report["rows_held_out"]
    for (error, spread), cosine in zip(found.squares.tolist(), found.cosines.tolist(), strict=True):
        assert any(np.allclose((error, spread, cosine), other, rtol=2e-3) for other in expected)
    assert found.record().r2 == pytest.approx(1 - found.squares[:, 0].sum().item() / found.squares[:, 1].sum().item())
    assert found.record().vectors == len(found.leverages)
    assert torch.equal(found.leverages, found.leverages.sort().values)


def test_effects_of_vectors_left_out_are_predicted_by_fits_without_them(
    experiment: Experiment, nowhere: RunFolder, rows: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    fit = fitted(nowhere, experiment)
    predicted, measured = (torch.cat(parts) for parts in zip(*left_out_effects(nowhere, experiment, fit), strict=True))
    x, y = rows
    centred = x - x.mean(0)
    absolute = fit.report["penalty"] * np.trace(centred.T @ centred) / 32
    assert len(predicted) == fit.report["rows_held_out"]
    for one, of in zip(predicted.numpy(), measured.numpy(), strict=True):
        i = next(i for i in range(40) if np.array_equal(y[i], of))
        rest = np.arange(40) != i
        assert np.allclose(one, np.append(1, x[i]) @ solved(x[rest], y[rest], absolute), atol=1e-4)


def test_a_fit_by_descent_never_saw_the_vectors_held_out(
    experiment: Experiment, nowhere: RunFolder, rows: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    report = {"solver": "adam", "rows_train": 30, "rows_held_out": 10, "rows_shipped": 40}
    fit = Fitted(EffectApproximator(torch.ones(32, 64), torch.zeros(64)), report)
    found = list(left_out_effects(nowhere, experiment, fit))
    predicted, measured = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert 0 < len(predicted) < 40
    for one, of in zip(predicted.numpy(), measured.numpy(), strict=True):
        i = next(i for i in range(40) if np.array_equal(rows[1][i], of))
        assert np.allclose(one, rows[0][i].sum(), atol=1e-4)
    with pytest.raises(InputError, match="exact fit alone"):
        evidence(nowhere, experiment, fit)


def test_vectors_near_in_leverage_are_a_fifth_of_those_left_out(experiment: Experiment, nowhere: RunFolder) -> None:
    leverages = torch.arange(1.0, 11.0).double()
    squares = torch.stack([leverages, torch.full((10,), 10.0).double()], 1)
    behind = evidence(nowhere, experiment, fitted(nowhere, experiment))
    found = replace(behind, leverages=leverages, squares=squares, cosines=leverages / 10)
    assert found.record(3.0) == (2, pytest.approx(1 - 7 / 20), pytest.approx(0.35))
    assert found.record(100.0) == (2, pytest.approx(1 - 19 / 20), pytest.approx(0.95))
    assert found.record() == (10, pytest.approx(0.45), pytest.approx(0.55))


def test_a_vector_of_the_fit_lies_where_it_would_without_itself(
    experiment: Experiment, nowhere: RunFolder, rows: tuple[NDArray[np.float64], NDArray[np.float64]]
) -> None:
    found = evidence(nowhere, experiment, fitted(nowhere, experiment))
    own = SteeringVector(torch.from_numpy(rows[0][7]).float(), experiment.hook_name)
    other = SteeringVector.from_tensor(torch.ones(32), experiment.hook_name)
    inside = found.leverage.of(own.direction[None]).item()
    assert (found.reach(own).fitted, found.reach(other).fitted) == (True, False)
    assert found.reach(own).leverage == pytest.approx(inside / (1 - inside))
    assert found.reach(other).leverage == found.leverage.of(other.direction[None]).item()
    assert found.reach(other).times_median == pytest.approx(found.reach(other).leverage / found.leverages.median().item())
    assert found.reach(other).share_nearer == (found.leverages < found.reach(other).leverage).double().mean().item()


def test_a_runs_own_approximator_stands_before_what_is_shipped(
    experiment: Experiment, measured: RunFolder, nowhere: RunFolder
) -> None:
    fit = fitted(nowhere, experiment)
    report = {**fit.report, "rows_shipped": 40}
    EffectApproximator(2 * fit.approximator.M, fit.approximator.b, {"fit": report}).save(nowhere.approximator)
    found = fitted(nowhere, experiment)
    assert (found.here, found.report) == (None, report)
    assert torch.equal(found.approximator.M, 2 * fit.approximator.M)
    assert evidence(nowhere, experiment, found).record().vectors == fit.report["rows_held_out"]


@pytest.mark.parametrize(
    ("provenance", "report", "reason"),
    [
        ({"published": {}}, {}, "published without the vectors"),
        ({}, {}, "the exact fit alone"),
        ({}, {"solver": "adam"}, "the exact fit alone"),
        ({}, {"rows_train": 30, "rows_held_out": 9}, "fitted to 39 vectors and 40 are measured now; run `saets fit` again"),
    ],
)
def test_where_the_rows_of_a_fit_are_not_known_the_reason_is_said(
    provenance: dict, report: dict, reason: str, experiment: Experiment, nowhere: RunFolder
) -> None:
    fit = fitted(nowhere, experiment)
    known = {**fit.report, **report} if "rows_train" in report else report
    with pytest.raises(InputError, match=reason):
        evidence(nowhere, experiment, Fitted(replace(fit.approximator, provenance=provenance), known))


def test_without_an_approximator_and_measured_effects_the_ways_to_one_are_said(
    tiny_experiment: Experiment, nowhere: RunFolder
) -> None:
    with pytest.raises(InputError, match=r"no approximator at .*no measured effects come with tiny; run `saets effects` and"):
        fitted(nowhere, tiny_experiment)
