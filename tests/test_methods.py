"""Each method against its formula, and the ingredients it may ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saets.approximator import EffectApproximator
from saets.config import METHOD_IDS
from saets.errors import InputError
from saets.methods import METHODS, build, needs

D_MODEL, D_SAE = 5, 8


class Only:
    """Ingredients that may be read; reading any other is a failure."""

    def __init__(self, **allowed: Any) -> None:
        self._allowed, self.read = allowed, set[str]()

    def __getattr__(self, name: str) -> Any:
        if name not in self._allowed:
            raise AssertionError(f"{name} was read")
        self.read.add(name)
        return self._allowed[name]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*pairs: tuple[int, float]) -> Tensor:
    vector = torch.zeros(D_SAE)
    for feature, weight in pairs:
        vector[feature] = weight
    return vector


def unit(vector: Tensor) -> Tensor:
    return vector / vector.square().sum().sqrt()


@pytest.fixture
def approximator() -> EffectApproximator:
    return EffectApproximator(3 * random(D_MODEL, D_SAE, seed=1), random(D_SAE, seed=2))


def test_caa_is_the_mean_of_the_positive_texts_minus_the_mean_of_the_negative_ones() -> None:
    positive, negative = random(4, D_MODEL, seed=3), random(4, D_MODEL, seed=4)
    found = build("caa", SimpleNamespace(positive=positive, negative=negative))
    expected = [sum(positive[:, i].tolist()) / 4 - sum(negative[:, i].tolist()) / 4 for i in range(D_MODEL)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_caa_finds_a_planted_direction_under_common_noise() -> None:
    direction, noise = unit(random(D_MODEL, seed=5)), random(50, D_MODEL, seed=6)
    found = build("caa", SimpleNamespace(positive=noise + 2 * direction, negative=noise - 2 * direction))
    assert torch.allclose(found, 4 * direction, atol=1e-5)


@pytest.mark.parametrize("pairs", [[(3, 1.0)], [(3, 0.5), (6, 0.5)], [(0, 0.3), (2, 0.4), (7, -0.3)]])
def test_sae_is_the_weighted_sum_of_the_features_decoder_rows(pairs: list[tuple[int, float]]) -> None:
    W_dec = random(D_SAE, D_MODEL, seed=7)
    found = build("sae", SimpleNamespace(decoder_target=weights(*pairs), W_dec=W_dec))
    assert torch.allclose(found, torch.stack([weight * W_dec[feature] for feature, weight in pairs]).sum(0), atol=1e-6)


@pytest.mark.parametrize("pairs", [[(3, 1.0)], [(3, 0.5), (6, 0.5)], [(0, 0.3), (2, 0.4), (7, -0.3)]])
@pytest.mark.parametrize("bias_weight", [0.0, 0.5, 1.0])
def test_sae_ts_goes_towards_the_target_column_and_away_from_the_bias(
    pairs: list[tuple[int, float]], bias_weight: float, approximator: EffectApproximator
) -> None:
    M, b = approximator.M, approximator.b
    towards = torch.stack([weight * M[:, feature] for feature, weight in pairs]).sum(0)
    away = torch.stack([b[feature] * M[:, feature] for feature in range(D_SAE)]).sum(0)
    ingredients = SimpleNamespace(target=weights(*pairs), approximator=approximator)
    found = build("sae_ts", ingredients, bias_weight=bias_weight)
    assert torch.allclose(found, unit(towards) - bias_weight * unit(away), atol=1e-5)


def test_sae_ts_takes_the_papers_lambda_of_one_where_none_is_given(approximator: EffectApproximator) -> None:
    ingredients = SimpleNamespace(target=weights((2, 1.0)), approximator=approximator)
    assert torch.equal(build("sae_ts", ingredients), build("sae_ts", ingredients, bias_weight=1.0))


def test_a_common_factor_of_the_weights_does_not_change_sae_ts(approximator: EffectApproximator) -> None:
    once, tenfold = (
        build("sae_ts", SimpleNamespace(target=factor * weights((2, 1.0), (4, 0.5)), approximator=approximator))
        for factor in (1, 10)
    )
    assert torch.allclose(once, tenfold, atol=1e-6)


def test_a_feature_with_a_longer_column_of_m_counts_for_more(approximator: EffectApproximator) -> None:
    longer = approximator.M.clone()
    longer[:, 3] *= 100
    ingredients = SimpleNamespace(target=weights((3, 0.5), (6, 0.5)), approximator=EffectApproximator(longer, approximator.b))
    found = build("sae_ts", ingredients, bias_weight=0.0)
    assert torch.dot(found, unit(approximator.M[:, 3])) > 0.99


def test_a_method_reads_only_the_ingredients_it_names(approximator: EffectApproximator) -> None:
    named = {
        "caa": {"positive": random(2, D_MODEL, seed=8), "negative": random(2, D_MODEL, seed=9)},
        "sae": {"decoder_target": weights((1, 1.0)), "W_dec": random(D_SAE, D_MODEL, seed=10)},
        "sae_ts": {"target": weights((1, 1.0)), "approximator": approximator},
    }
    assert set(named) == set(METHODS) == set(METHOD_IDS)
    for method, allowed in named.items():
        ingredients = Only(**allowed)
        assert build(method, ingredients, bias_weight=0.5).shape == (D_MODEL,)
        assert ingredients.read == set(allowed)
        assert all(needs(method, ingredient) for ingredient in allowed)
        others = {ingredient for other in named.values() for ingredient in other} - set(allowed)
        assert not any(needs(method, ingredient) for ingredient in others)


def test_an_unknown_method_is_refused_with_the_nearest_one_before_anything_is_read() -> None:
    with pytest.raises(InputError, match="unknown method 'sae-ts'; known: caa, sae, sae_ts; did you mean 'sae_ts'"):
        build("sae-ts", Only())
