"""What is said of a fit on rows it did not see, against the same figures computed one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from saets.fit.approximator import EffectApproximator, Moments, RidgePath
from saets.fit.held_out import HeldOutScores, is_held_out

D_MODEL, D_SAE = 5, 8


class Split:
    """Planted effects with noise, some of them to fit and some held out; the last feature never fires."""

    def __init__(self, *, noise: float = 0.3, train: int = 40, held_out: int = 17) -> None:
        generator = torch.Generator().manual_seed(3)
        M = torch.randn(D_MODEL, D_SAE, generator=generator)
        X = torch.nn.functional.normalize(torch.randn(train + held_out, D_MODEL, generator=generator), dim=-1)
        Y = X @ M + 0.5 + noise * torch.randn(len(X), D_SAE, generator=generator)
        Y[:, -1] = 0
        self.X, self.Y, self.X_train, self.Y_train = X[train:], Y[train:], X[:train], Y[:train]
        self.train, self.held_out = Moments(D_MODEL, D_SAE), Moments(D_MODEL, D_SAE)
        self.train.add(self.X_train, self.Y_train)
        self.held_out.add(self.X, self.Y)
        self.errors = torch.linspace(0.1, 0.5, held_out, dtype=torch.float64)
        self.weights = torch.ones(held_out, dtype=torch.float64)

    def scores(self, approximator: EffectApproximator, rows: slice = slice(None)) -> HeldOutScores:
        scores = HeldOutScores(self.train.y / self.train.n, self.held_out.y / self.held_out.n)
        scores.add(approximator, self.X[rows], self.Y[rows], self.errors[rows], self.weights[rows])
        return scores


def test_the_figures_by_hand() -> None:
    split = Split()
    approximator = RidgePath(split.train).fit(0.1)
    report = split.scores(approximator).report()
    predicted, mean = split.X @ approximator.M + approximator.b, split.Y_train.mean(0)
    cosine = torch.nn.functional.cosine_similarity
    mse, mean_effect = (predicted - split.Y).square().mean().item(), (mean - split.Y).square().mean().item()
    noise = split.errors.square().mean().item()
    expected = {
        "mse": mse,
        "r2": 1 - mse / mean_effect,
        "cosine": cosine(predicted, split.Y).mean().item(),
        "mse_mean_effect": mean_effect,
        "cosine_mean_effect": cosine(mean[None], split.Y).mean().item(),
        "mse_zero": split.Y.square().mean().item(),
        "mse_noise": noise,
        "noise_share": noise / mse,
        "r2_ceiling": 1 - noise / mean_effect,
    }
    features = report.pop("feature_r2")
    assert report == pytest.approx(expected, rel=1e-5)
    each = 1 - ((predicted - split.Y).square().sum(0) / (mean - split.Y).square().sum(0))[:-1].numpy()
    assert features.pop("features") == D_SAE - 1, "the feature that never fires has no R2"
    assert features.pop("share_above_half") == pytest.approx((each > 0.5).mean())
    assert list(features) == ["lower_quartile", "median", "upper_quartile"]
    assert list(features.values()) == pytest.approx(np.quantile(each, [0.25, 0.5, 0.75]), rel=1e-4)


def test_the_scores_of_two_workers_add_up_to_those_of_one() -> None:
    split = Split()
    approximator = RidgePath(split.train).fit(0.1)
    both = split.scores(approximator, slice(0, 6))
    for mine, other in zip(both.tensors(), split.scores(approximator, slice(6, None)).tensors(), strict=True):
        mine += other
    expected = split.scores(approximator).report()
    assert both.report().pop("feature_r2") == pytest.approx(expected.pop("feature_r2"))
    assert {**both.report(), "feature_r2": None} == pytest.approx({**expected, "feature_r2": None})


def test_with_many_rows_the_fit_comes_down_to_the_noise_and_r2_up_to_its_ceiling() -> None:
    split = Split(train=4000, held_out=1000)
    split.errors = torch.full((1000,), 0.3 * (1 - 1 / D_SAE) ** 0.5, dtype=torch.float64)  # the silent feature has none
    report = split.scores(RidgePath(split.train).fit(0.0)).report()
    assert report["noise_share"] == pytest.approx(1, abs=0.05)
    assert report["r2"] == pytest.approx(report["r2_ceiling"], abs=0.02)


def test_a_row_of_weight_two_is_scored_as_two_rows() -> None:
    split = Split()
    approximator = RidgePath(split.train).fit(0.1)
    split.weights[3] = 2
    split.held_out = Moments(D_MODEL, D_SAE)
    split.held_out.add(split.X, split.Y, split.weights)
    weighted = split.scores(approximator).report()
    twice = torch.tensor([*range(17), 3])
    split.X, split.Y, split.errors, split.weights = split.X[twice], split.Y[twice], split.errors[twice], torch.ones(18)
    split.held_out = Moments(D_MODEL, D_SAE)
    split.held_out.add(split.X, split.Y)
    repeated = split.scores(approximator).report()
    assert weighted.pop("feature_r2") == pytest.approx(repeated.pop("feature_r2"))
    assert weighted == pytest.approx(repeated)


def test_a_standard_error_that_is_not_known_leaves_the_noise_out_and_the_rest_in() -> None:
    split = Split()
    split.errors[4] = float("nan")
    report = split.scores(RidgePath(split.train).fit(0.1)).report()
    assert [report[name] for name in ("mse_noise", "noise_share", "r2_ceiling")] == [None] * 3
    assert report["r2"] > 0
    assert "NaN" not in json.dumps(report)


def test_a_single_row_held_out_has_features_without_r2() -> None:
    split = Split(held_out=1)
    assert split.scores(RidgePath(split.train).fit(0.1)).report()["feature_r2"] == {"features": 0}


def test_a_row_is_held_out_by_its_id_and_the_seed_alone() -> None:
    ids = [f"decoder:{i}" for i in range(4000)]
    drawn = is_held_out(ids, 7, 0.1)
    assert drawn.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(is_held_out(ids[::-1], 7, 0.1), drawn[::-1])
    assert not np.array_equal(is_held_out(ids, 8, 0.1), drawn)
