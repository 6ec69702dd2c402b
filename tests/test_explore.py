"""A run to play with: text side by side, scales, forecasts and measurements, with the tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from saets import Run, SteeringVector
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator
from saets.forecast.prediction import gain, target_of
from saets.run_folder.fitted import fitted
from saets.run_folder.store import RunFolder
from saets.tokens import encode

PIN = ["model.dtype=float32", "model.device=cpu"]
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def run(measured: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody has made, of an experiment with which measured effects come."""
    return Run(tmp_path_factory.mktemp("new") / "run", load_experiment("tiny", [*PIN, f"effects.shipped={measured.path}"]))


@pytest.fixture(scope="module")
def vector(run: Run) -> SteeringVector:
    return run.target({3: 1.0, 5: 0.5})


def of_row(measured: RunFolder, index: int) -> tuple[SteeringVector, dict[str, Any]]:
    frame = measured.effects.read()
    assert frame is not None
    row = frame.row(by_predicate=pl.col("index") == index, named=True)
    return SteeringVector(torch.tensor(row["vector"]), HOOK), row


def test_texts_side_by_side_are_those_of_each_scale_alone_and_share_their_noise(run: Run, vector: SteeringVector) -> None:
    both = run.compare("I think", vector, (0.0, 6.0), samples=4, new_tokens=10, seed=3)
    assert [len(texts) for texts in both] == [4, 4]
    assert both[0] == run.complete("I think", samples=4, new_tokens=10, seed=3)
    assert both[1] == run.complete("I think", vector, scale=6.0, samples=4, new_tokens=10, seed=3)
    assert both[0] != both[1]
    assert both[0] != run.complete("I think", samples=4, new_tokens=10, seed=4)


def test_a_completion_is_that_of_a_model_steered_at_every_position(run: Run, vector: SteeringVector) -> None:
    """Of the likeliest tokens, so that the model with the vector applied says what they are."""
    greedy = run.experiment.evaluation.model_copy(update={"top_k": 1})
    likeliest = Run(run.folder.path, run.experiment.model_copy(update={"evaluation": greedy}))
    tokens = encode(run.model.tokenizer, "I think")
    start = len(tokens)
    with vector.applied(run.model, scale=6.0) as steered, torch.no_grad():
        for _ in range(5):
            tokens.append(steered(torch.tensor([tokens]))[0, -1].argmax().item())
    expected = run.model.tokenizer.decode(tokens[start:], skip_special_tokens=True)
    assert likeliest.complete("I think", vector, scale=6.0, samples=2, new_tokens=5) == [expected] * 2


def test_in_chat_the_answer_is_given_up_to_its_end(chat_experiment: Experiment, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", chat_experiment)
    plain, chat = (run.complete("hi", samples=8, new_tokens=30, prompt_format=how) for how in ("plain", "chat"))
    assert plain == run.complete("hi", samples=8, new_tokens=30)
    assert plain != chat
    assert not any("<end>" in text or "[assistant]" in text for text in chat)
    in_chat = chat_experiment.model_copy(
        update={"evaluation": chat_experiment.evaluation.model_copy(update={"prompt_format": "chat"})}
    )
    assert Run(tmp_path / "run", in_chat).complete("hi", samples=8, new_tokens=30) == chat


def test_a_model_without_a_chat_template_is_refused_in_chat(run: Run) -> None:
    with pytest.raises(InputError, match="no chat template"):
        run.complete("hi", prompt_format="chat")


@pytest.mark.parametrize(
    ("vector", "reason", "forced"),
    [
        (SteeringVector.from_tensor(torch.ones(32), "blocks.1.hook_resid_post"), "is for blocks.1.hook_resid_post", True),
        (SteeringVector.from_tensor(torch.ones(32), HOOK, model="another"), "was made for another", True),
        (SteeringVector.from_tensor(torch.ones(31), HOOK), "has 31 numbers, the residual stream of tiny has 32", False),
    ],
)
def test_a_vector_of_another_model_or_hook_is_refused_unless_forced(
    run: Run, vector: SteeringVector, reason: str, forced: bool
) -> None:
    for use in (
        lambda **how: run.complete("hi", vector, scale=2.0, samples=1, new_tokens=2, **how),
        lambda **how: run.forecast(vector, **how),
    ):
        with pytest.raises(InputError, match=reason):
            use()
        if forced:
            assert len(use(force=True))
        else:
            with pytest.raises(InputError, match=reason):
                use(force=True)


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({64: 1.0}, "no feature 64; the SAE has features 0 to 63"),
        ({-1: 1.0}, "no feature -1"),
        ({3: 0.0, 4: 0.0}, "got 3: 0, 4: 0; give at least one feature, with a weight that is a number and not zero"),
        ({}, "got no features"),
        ({3: math.nan}, "got 3: nan"),
    ],
)
def test_features_that_cannot_be_targeted_are_refused(features: dict[int, float], reason: str, run: Run) -> None:
    with pytest.raises(InputError, match=reason):
        run.target(features)


def test_the_scale_is_the_one_at_which_the_vector_was_measured(run: Run, measured: RunFolder) -> None:
    vector, row = of_row(measured, 4)
    found = run.calibrate(vector)
    assert (found.scale, found.outcome) == (pytest.approx(row["scale"], rel=1e-4), row["calibration"])


def test_a_forecast_shows_the_features_asked_for_and_then_the_strongest_others(run: Run, vector: SteeringVector) -> None:
    found = run.forecast(vector, top=5, features=[3, 5])
    predicted = vector.direction @ run.approximator.M + run.approximator.b
    others = [feature for feature in predicted.abs().argsort(descending=True).tolist() if feature not in (3, 5)]
    assert found.columns == ["feature", "predicted", "common", "feature_r2", "label"]
    assert found["feature"].to_list() == [3, 5, *others[:5]]
    assert found["predicted"].to_list() == pytest.approx(predicted[found["feature"].to_list()].tolist(), abs=1e-5)
    assert found["common"].to_list() == pytest.approx(run.approximator.b[found["feature"].to_list()].tolist())
    r2 = run.approximator.feature_r2
    assert r2 is not None
    assert found["feature_r2"].to_list() == pytest.approx(r2[found["feature"].to_list()].tolist())
    assert run.forecast(vector, top=0, features=[7])["feature"].to_list() == [7]
    with pytest.raises(InputError, match="no feature 64"):
        run.forecast(vector, features=[64])


def test_where_the_r2_of_features_is_not_known_it_is_null(run: Run, vector: SteeringVector, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "own")
    EffectApproximator(run.approximator.M, run.approximator.b).save(folder.approximator)
    assert Run(folder.path, run.experiment).forecast(vector, top=2)["feature_r2"].is_null().all()


def test_labels_that_are_given_stand_beside_their_features(run: Run, vector: SteeringVector) -> None:
    found = run.forecast(vector, top=1, features=[3, 5], labels={5: "five", 6: "six"})
    assert found["label"].to_list()[:2] == [None, "five"]


def test_a_measured_effect_is_the_one_that_the_effects_stage_writes(run: Run, measured: RunFolder) -> None:
    vector, row = of_row(measured, 11)
    found = run.measure(vector)
    effect = np.asarray(row["effect"], dtype=np.float32)
    assert np.abs(found.effect - effect).max() < 2e-3 * np.abs(effect).max()
    assert found.calibration.scale == pytest.approx(row["scale"], rel=1e-4)
    assert found.n_rollouts == row["n_rollouts"]
    assert np.sqrt(np.square(found.standard_error).mean()) == pytest.approx(row["standard_error"], rel=0.3)
    table = run.forecast(vector, top=3, features=[9], measure=True)
    assert table.columns == ["feature", "predicted", "common", "feature_r2", "measured", "standard_error", "label"]
    assert table["measured"].to_list() == found.effect[table["feature"].to_list()].tolist()


def test_without_a_baseline_one_is_measured_with_the_vector(
    run: Run, measured: RunFolder, tiny_experiment: Experiment, tmp_path: Path
) -> None:
    vector, _ = of_row(measured, 11)
    alone = Run(tmp_path / "none", tiny_experiment)
    assert np.allclose(alone.measure(vector).effect, run.measure(vector).effect, atol=1e-5)
    assert (alone.measure(vector).standard_error >= run.measure(vector).standard_error).all()
    assert not (tmp_path / "none").exists()


def test_agreement_is_of_all_features_about_the_mean_effect(run: Run, measured: RunFolder) -> None:
    vector, _ = of_row(measured, 11)
    frame = measured.effects.read()
    assert frame is not None
    mean = frame["effect"].to_numpy().astype(np.float64).mean(0)
    effect, predicted = run.measure(vector).effect, run.approximator.predict(vector.direction).numpy()
    found = run.agreement(vector)
    assert found.r2 == pytest.approx(1 - np.square(effect - predicted).sum() / np.square(effect - mean).sum(), rel=1e-3)
    assert found.cosine == pytest.approx(effect @ predicted / np.linalg.norm(effect) / np.linalg.norm(predicted), rel=1e-4)


def test_no_unit_vector_is_predicted_to_gain_more_than_the_best(run: Run) -> None:
    target = {3: 1.0, 5: -0.5}
    t = torch.zeros(64)
    t[3], t[5] = 1.0, -0.5
    best = SteeringVector.from_tensor(run.approximator.M @ t, HOOK)
    found = gain(run.approximator, best, target)
    assert found.predicted == pytest.approx(found.best, rel=1e-5)
    for seed in range(20):
        other = SteeringVector.from_tensor(torch.randn(32, generator=torch.Generator().manual_seed(seed)), HOOK)
        gained = gain(run.approximator, other, target)
        predicted = run.approximator.predict(other.direction)
        assert gained.predicted == pytest.approx((predicted[3] - 0.5 * predicted[5]).item(), abs=1e-5)
        assert gained.predicted < gained.best == pytest.approx(found.best)


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({"features": {3: 1.0}}, {3: 1.0}),
        ({"features": {"3": 1.0, "4": 0.5}}, {3: 1.0, 4: 0.5}),
        ({"features": {"target": [[3, 1.0], [4, 0.5]]}, "goal": "london"}, {3: 1.0, 4: 0.5}),
        ({"features": [[3, 1.0]]}, {3: 1.0}),
        ({"goal": "wedding", "method": "caa"}, {5: 0.5, 7: 0.5}),
        ({"goal": "anger"}, {}),
        ({}, {}),
    ],
)
def test_a_vectors_target_is_what_its_file_or_its_goal_names(
    provenance: dict[str, Any], expected: dict[int, float], tiny_experiment: Experiment
) -> None:
    assert target_of(SteeringVector.from_tensor(torch.ones(32), HOOK, **provenance), tiny_experiment) == expected


def test_a_measurement_against_a_baseline_of_other_weights_is_refused(run: Run, measured: RunFolder, tmp_path: Path) -> None:
    other = Run(tmp_path / "run", load_experiment("tiny", [*PIN, "model.random.seed=1", f"effects.shipped={measured.path}"]))
    vector, _ = of_row(measured, 0)
    with pytest.raises(InputError, match=r"measured with other settings \(model.random.seed: 0 -> 1\)"):
        other.measure(vector)


def test_the_runs_own_approximator_is_used_where_there_is_one(run: Run, measured: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "own")
    found = fitted(run.folder, run.experiment).approximator
    EffectApproximator(-found.M, found.b).save(folder.approximator)
    vector = Run(folder.path, run.experiment).target({3: 1.0}, bias_weight=0.0)
    assert torch.allclose(vector.direction, -run.target({3: 1.0}, bias_weight=0.0).direction, atol=1e-6)
