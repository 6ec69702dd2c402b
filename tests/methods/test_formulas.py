"""Each method against its formula, and the ingredients it may ask for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saets.errors import InputError
from saets.experiment.method_id import METHOD_IDS, METHOD_OPTIONS, MethodOptions
from saets.fit.approximator import EffectApproximator
from saets.methods.formulas import METHODS, build, needs, options_of
from saets.methods.rotation import procrustes

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
    W_dec, target = random(D_SAE, D_MODEL, seed=10), {"target": weights((1, 1.0)), "approximator": approximator}
    named = {
        "caa": {"positive": random(2, D_MODEL, seed=8), "negative": random(2, D_MODEL, seed=9)},
        "sae": {"decoder_target": weights((1, 1.0)), "W_dec": W_dec},
        "sae_ts": target,
        "pinverse": target,
        "pinverse_raw": target,
        "rotation": {**target, "W_dec": W_dec, "Q": torch.eye(D_MODEL)},
        "fgaa": {"feature_contrast": weights((1, 1.0), (2, 0.5)), "approximator": approximator},
        "ridge": target,
        "constrained": {**target, "stillness": torch.ones(D_SAE)},
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
    with pytest.raises(InputError, match="unknown method 'sae-ts'; known: caa, .*; did you mean 'sae_ts'"):
        build("sae-ts", Only())


@pytest.mark.parametrize("method", ["pinverse", "pinverse_raw"])
def test_the_pseudoinverse_is_the_least_squares_solution_for_the_unit_target(
    method: str, approximator: EffectApproximator
) -> None:
    t = weights((3, 2.0), (6, 1.0))
    found = build(method, SimpleNamespace(target=t, approximator=approximator))
    M, b = approximator.M.double(), approximator.b.double()
    expected = torch.linalg.inv(M @ M.T) @ M @ (t.double() / 5**0.5 - b)
    assert torch.allclose(found.double(), expected, atol=1e-5)
    missed = (M.T @ found.double() + b - unit(t).double()).square().sum()
    for step in 1e-2 * torch.eye(D_MODEL, dtype=torch.float64):
        assert (M.T @ (found.double() + step) + b - unit(t).double()).square().sum() > missed


def test_the_pseudoinverse_gives_nothing_to_directions_that_m_does_not_see(approximator: EffectApproximator) -> None:
    unseen = unit(random(D_MODEL, seed=11))
    M = approximator.M - torch.outer(unseen, unseen @ approximator.M)
    blind = SimpleNamespace(target=weights((3, 1.0)), approximator=EffectApproximator(M, approximator.b))
    for method in ("pinverse", "ridge"):
        found = build(method, blind, ridge_penalty=0.0)
        assert abs((found @ unseen).item()) < 1e-4 * found.norm().item()


@pytest.mark.parametrize("bias_weight", [0.0, 0.5, 1.0])
def test_rotation_turns_the_unit_target_and_goes_away_from_the_bias(bias_weight: float, approximator: EffectApproximator) -> None:
    W_dec, Q = random(D_SAE, D_MODEL, seed=12), torch.linalg.qr(random(D_MODEL, D_MODEL, seed=13)).Q
    t = weights((1, 0.5), (4, 2.0))
    ingredients = SimpleNamespace(target=t, W_dec=W_dec, Q=Q, approximator=approximator)
    found = build("rotation", ingredients, bias_weight=bias_weight)
    expected = unit(Q @ unit(0.5 * W_dec[1] + 2 * W_dec[4])) - bias_weight * unit(approximator.M @ approximator.b)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kept", [1, 2, 3, 8])
def test_fgaa_is_sae_ts_for_the_largest_contrasts_and_never_for_negative_ones(
    kept: int, approximator: EffectApproximator
) -> None:
    contrast = torch.tensor([0.1, -5.0, 2.0, 0.0, -0.5, 1.0, 0.0, -1.0])
    order = [(2, 2.0), (5, 1.0), (0, 0.1)]
    found = build(
        "fgaa", SimpleNamespace(feature_contrast=contrast, approximator=approximator), fgaa_features=kept, bias_weight=0.5
    )
    same = SimpleNamespace(target=weights(*order[:kept]), approximator=approximator)
    assert torch.allclose(found, build("sae_ts", same, bias_weight=0.5), atol=1e-6)


def test_fgaa_says_what_to_do_where_nothing_sets_the_texts_apart(approximator: EffectApproximator) -> None:
    with pytest.raises(InputError, match="no feature fires more on the positive contrast texts"):
        build("fgaa", SimpleNamespace(feature_contrast=weights((1, -1.0)), approximator=approximator))


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 10.0])
@pytest.mark.parametrize("size", [0.3, 4.0])
def test_ridge_solves_its_normal_equations(penalty: float, size: float, approximator: EffectApproximator) -> None:
    t = weights((3, 1.0), (6, 0.5))
    ingredients = SimpleNamespace(target=t, approximator=approximator)
    x = build("ridge", ingredients, ridge_penalty=penalty, ridge_target_size=size).double()
    M, b = approximator.M.double(), approximator.b.double()
    mean = M.square().sum() / D_MODEL
    assert torch.allclose(M @ (M.T @ x + b - size * t.double()) + penalty * mean * x, torch.zeros_like(x), atol=1e-4)


def test_the_ridge_path_begins_at_the_pseudoinverse(approximator: EffectApproximator) -> None:
    t = weights((3, 2.0), (6, 1.0))
    ingredients = SimpleNamespace(target=t, approximator=approximator)
    start = build("ridge", ingredients, ridge_penalty=0.0, ridge_target_size=1 / t.norm().item())
    assert torch.allclose(start, build("pinverse", ingredients), atol=1e-5)


@pytest.mark.parametrize("bias_weight", [0.0, 0.5, 1.0])
def test_the_ridge_path_ends_in_sae_ts(bias_weight: float, approximator: EffectApproximator) -> None:
    ingredients = SimpleNamespace(target=weights((3, 1.0), (6, 0.5)), approximator=approximator)
    end = unit(build("ridge", ingredients, ridge_penalty=1e6, bias_weight=bias_weight))
    assert torch.allclose(end, unit(build("sae_ts", ingredients, bias_weight=bias_weight)), atol=1e-5)


def test_the_ridge_path_of_another_target_size_ends_in_sae_ts_of_another_weight(approximator: EffectApproximator) -> None:
    t, size = weights((3, 1.0), (6, 0.5)), 2.0
    ingredients = SimpleNamespace(target=t, approximator=approximator)
    M, b = approximator.M, approximator.b
    end = unit(build("ridge", ingredients, ridge_penalty=1e6, ridge_target_size=size))
    weight = (M @ b).norm() / (size * (M @ t).norm())
    assert torch.allclose(end, unit(build("sae_ts", ingredients, bias_weight=weight.item())), atol=1e-5)


@pytest.mark.parametrize("method", ["sae_ts", "pinverse", "ridge"])
def test_a_target_that_no_vector_reaches_is_refused_and_not_replaced_by_the_bias(
    method: str, approximator: EffectApproximator
) -> None:
    M = approximator.M.clone()
    M[:, 3] = 0
    ingredients = SimpleNamespace(target=weights((3, 1.0)), approximator=EffectApproximator(M, approximator.b))
    with pytest.raises(InputError, match="knows of no vector that changes the target's features"):
        build(method, ingredients)


D, FEATURES = 24, 200


@pytest.fixture(scope="module")
def planted() -> SimpleNamespace:
    """Effects along decoder rows turned by Q, a bias common to all vectors, and texts that differ along the target's column.

    The target's predicted effect and the contrast of texts have the same direction, which all methods should find: for SAE, which
    knows nothing of effects, nothing is turned.
    """
    generator = torch.Generator().manual_seed(14)
    W_dec = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=generator), dim=1)
    turn = torch.linalg.qr(torch.eye(D) + 0.1 * torch.randn(D, D, generator=generator)).Q
    turn = turn * (turn.diagonal().sign())[None]
    M = 2 * (W_dec @ turn.T).T
    b = 0.02 * torch.randn(FEATURES, generator=generator)
    direction = M[:, 7] / 2
    noise = torch.randn(12, D, generator=generator)
    target = torch.zeros(FEATURES)
    target[7] = 1.0
    contrast = 0.2 * torch.randn(FEATURES, generator=generator)
    contrast[7] = 9.0
    return SimpleNamespace(
        direction=direction,
        positive=noise + direction,
        negative=noise - direction,
        target=target,
        decoder_target=target,
        W_dec=W_dec,
        Q=procrustes(W_dec, M),
        approximator=EffectApproximator(M, b),
        stillness=torch.ones(FEATURES),
        feature_contrast=contrast,
    )


@pytest.mark.parametrize("method", METHOD_IDS)
def test_every_method_finds_the_planted_direction(method: str, planted: SimpleNamespace) -> None:
    found = unit(build(method, planted, bias_weight=0.2))
    chance = random(1000, D, seed=15)
    found_by_chance = ((chance / chance.norm(dim=1, keepdim=True)) @ planted.direction).max()
    assert found @ planted.direction > 0.8 > found_by_chance


def test_options_that_a_method_does_not_have_change_nothing(planted: SimpleNamespace) -> None:
    options = {"bias_weight": 0.3, "ridge_penalty": 5.0, "fgaa_features": 2, "stillness": "equal", "max_density": 0.5}
    assert torch.equal(build("caa", planted, **options), build("caa", planted))
    assert options_of("ridge", options) == {"bias_weight": 0.3, "ridge_penalty": 5.0}


def test_a_method_named_with_options_is_the_method_built_with_them(planted: SimpleNamespace) -> None:
    for_all = {"bias_weight": 0.3, "ridge_penalty": 5.0}
    found = build("ridge:bias_weight=0.7", planted, **for_all)
    assert torch.equal(found, build("ridge", planted, bias_weight=0.7, ridge_penalty=5.0))
    assert not torch.allclose(unit(found), unit(build("ridge", planted, **for_all)))
    assert options_of("ridge:bias_weight=0.7", for_all) == {"bias_weight": 0.7, "ridge_penalty": 5.0}
    assert needs("fgaa:fgaa_features=2", "feature_contrast")
    assert not needs("sae_ts:bias_weight=0", "W_dec")


def test_the_options_by_which_methods_are_named_are_those_that_their_formulas_have() -> None:
    for method, formula in METHODS.items():
        parameters = inspect.signature(formula).parameters.values()
        have = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        assert sorted(METHOD_OPTIONS[method]) == sorted(have)
        defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name in have}
        assert defaults == MethodOptions().model_dump(include=set(have))
