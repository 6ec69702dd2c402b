"""The constrained problem: a global optimum, its limits, and how gamma is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saets.fit.approximator import EffectApproximator
from saets.methods.formulas import constrained, pinverse, ridge, sae_ts
from saets.methods.side_effects import SideEffects

D_MODEL, D_SAE = 6, 30


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def weights(*pairs: tuple[int, float]) -> Tensor:
    vector = torch.zeros(D_SAE)
    for feature, weight in pairs:
        vector[feature] = weight
    return vector


TARGET = weights((3, 1.0), (8, 0.5))
EVERYTHING = torch.ones(D_SAE)
REST = torch.where(TARGET == 0, 1.0, 0.0)


@pytest.fixture(scope="module")
def approximator() -> EffectApproximator:
    return EffectApproximator(random(D_MODEL, D_SAE, seed=1), 0.3 * random(D_SAE, seed=2))


def objective(x: Tensor, gamma: float, approximator: EffectApproximator, D: Tensor) -> float:
    """m'x - gamma/2 (M'x + b)' D (M'x + b), feature by feature."""
    effects = [sum(approximator.M[i, j].item() * x[i].item() for i in range(D_MODEL)) for j in range(D_SAE)]
    gain = sum(TARGET[j].item() * effects[j] for j in range(D_SAE))
    cost = sum(D[j].item() * (effects[j] + approximator.b[j].item()) ** 2 for j in range(D_SAE))
    return gain - gamma / 2 * cost


@pytest.mark.parametrize("gamma", [0.01, 0.3, 2.0, 50.0])
@pytest.mark.parametrize("D", [REST, EVERYTHING, random(D_SAE, seed=3).abs()], ids=["rest", "everything", "weighted"])
def test_no_other_unit_vector_is_better(gamma: float, D: Tensor, approximator: EffectApproximator) -> None:
    x = SideEffects(approximator, TARGET, D).best(gamma)
    assert x.norm().item() == pytest.approx(1, abs=1e-9)
    best = objective(x, gamma, approximator, D)
    others = [*random(300, D_MODEL, seed=4).double(), *(x + 0.02 * random(100, D_MODEL, seed=5).double()), -x]
    assert all(objective(unit(other), gamma, approximator, D) < best for other in others)


def test_gain_and_cost_are_those_of_the_formula(approximator: EffectApproximator) -> None:
    problem, x, D = SideEffects(approximator, TARGET, REST), unit(random(D_MODEL, seed=6)), REST
    assert problem.gain(x) == pytest.approx(objective(x, 0, approximator, D), abs=1e-5)
    assert problem.gain(x) - problem.cost(x) / 2 == pytest.approx(objective(x, 1, approximator, D), abs=1e-4)


def test_without_gamma_or_weights_it_is_the_unit_target(approximator: EffectApproximator) -> None:
    expected = unit(approximator.M @ TARGET)
    assert torch.allclose(SideEffects(approximator, TARGET, REST).best(0.0).float(), expected, atol=1e-6)
    assert torch.allclose(SideEffects(approximator, TARGET, torch.zeros(D_SAE)).best(5.0).float(), expected, atol=1e-6)
    assert torch.allclose(constrained(TARGET, approximator, torch.zeros(D_SAE)), expected, atol=1e-6)


def test_a_small_gamma_is_a_step_towards_sae_ts(approximator: EffectApproximator) -> None:
    """With D = I and no curvature: u(Mt - gamma Mb), SAE-TS of weight gamma ||Mb|| / ||Mt||."""
    flat = EffectApproximator(approximator.M, 1e4 * approximator.b)
    gamma = 3e-5
    weight = gamma * (flat.M @ flat.b).norm() / (flat.M @ TARGET).norm()
    expected = unit(sae_ts(TARGET, flat, bias_weight=weight.item()))
    assert torch.allclose(SideEffects(flat, TARGET, EVERYTHING).best(gamma).float(), expected, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 5.0])
def test_with_all_features_held_it_lies_on_the_ridge_path(gamma: float, approximator: EffectApproximator) -> None:
    """D = I, target included: (M M' + lambda I)^-1 M (t / gamma - b) for some lambda."""
    x = SideEffects(approximator, TARGET, EVERYTHING).best(gamma)
    M, b = approximator.M.double(), approximator.b.double()
    size = M.square().sum() / D_MODEL
    wanted = M @ (TARGET.double() / gamma - b)
    penalty = ((wanted - M @ M.T @ x) @ x / size).item()
    if penalty >= 0:
        on_path = ridge(TARGET, approximator, ridge_penalty=penalty, ridge_target_size=1 / gamma)
        assert torch.allclose(on_path.double(), x, atol=1e-4)
    assert torch.allclose(M @ M.T @ x + penalty * size * x, wanted, atol=1e-6)


def test_where_the_sphere_does_not_bind_it_is_the_pseudoinverse(approximator: EffectApproximator) -> None:
    """mu = 0: the target's size is that for which the pseudoinverse of t / gamma has unit length."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        gamma = (low * high) ** 0.5
        x = torch.linalg.lstsq(approximator.M.T.double(), (TARGET / gamma - approximator.b).double()[:, None]).solution
        low, high = (gamma, high) if x.norm() > 1 else (low, gamma)
    found = SideEffects(approximator, TARGET, EVERYTHING).best(gamma)
    assert torch.allclose(found, x[:, 0], atol=1e-5)
    scaled = EffectApproximator(approximator.M, approximator.b * gamma / TARGET.norm())
    assert torch.allclose(unit(pinverse(TARGET, scaled)), found.float(), atol=1e-4)


def test_without_b_it_is_the_largest_gain_for_its_cost(approximator: EffectApproximator) -> None:
    """b left out: u((K + lambda I)^-1 m), which maximises (m'x)^2 / x'(K + lambda I)x."""
    plain = EffectApproximator(approximator.M, torch.zeros(D_SAE))
    gamma = 2.0
    x = SideEffects(plain, TARGET, REST).best(gamma)
    M = plain.M.double()
    m, K = M @ TARGET.double(), M @ torch.diag(REST.double()) @ M.T
    wanted = m - gamma * K @ x
    assert torch.allclose(wanted, (wanted @ x) * x, atol=1e-6), "stationary on the sphere"
    penalty = (wanted @ x) / gamma
    shifted = K + penalty * torch.eye(D_MODEL)
    assert torch.allclose(unit(torch.linalg.solve(shifted, m)), x, atol=1e-6)
    assert all((m @ y) ** 2 / (y @ shifted @ y) < (m @ x) ** 2 / (x @ shifted @ x) for y in random(200, D_MODEL, seed=7).double())


def test_a_few_features_weighted_without_bound_do_not_move_at_all(approximator: EffectApproximator) -> None:
    """u(m - M_S (M_S'M_S)^-1 M_S'm): what is left of m beside the columns in S."""
    plain, held = EffectApproximator(approximator.M, torch.zeros(D_SAE)), [0, 11, 20]
    x = SideEffects(plain, TARGET, weights(*((j, 1e6) for j in held))).best(1.0)
    M, m = plain.M.double(), plain.M.double() @ TARGET.double()
    S = M[:, held]
    assert torch.allclose(x, unit(m - S @ torch.linalg.solve(S.T @ S, S.T @ m)), atol=1e-4)


def test_the_gain_falls_with_gamma(approximator: EffectApproximator) -> None:
    problem = SideEffects(approximator, TARGET, REST)
    gains = [problem.gain(problem.best(gamma)) for gamma in (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("bias_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stillness", [EVERYTHING, random(D_SAE, seed=8).abs()], ids=["equal", "weighted"])
def test_by_default_it_gives_as_much_target_as_sae_ts_for_no_more_cost(
    bias_weight: float, stillness: Tensor, approximator: EffectApproximator
) -> None:
    x = constrained(TARGET, approximator, stillness, bias_weight=bias_weight)
    other = unit(sae_ts(TARGET, approximator, bias_weight=bias_weight))
    problem = SideEffects(approximator, TARGET, torch.where(TARGET == 0, stillness, 0.0))
    assert problem.gain(x) == pytest.approx(problem.gain(other), rel=1e-4)
    assert problem.cost(x) <= problem.cost(other) * (1 + 1e-5)


def test_where_the_gain_never_falls_that_far_gamma_is_capped(approximator: EffectApproximator) -> None:
    problem = SideEffects(approximator, TARGET, REST)
    capped = problem.largest_gamma(-1e9)
    assert problem.largest_gamma(problem.gain(problem.best(0.0)) + 1) == 0.0
    assert 0 < problem.largest_gamma(problem.gain(problem.best(1.0))) < capped < float("inf")


def test_a_target_without_anything_along_the_stillest_direction_still_gives_unit_length() -> None:
    """The hard case: no mu gives unit length, and what is missing lies along the least eigenvector."""
    M = torch.zeros(3, 3)
    M[0, 0], M[1, 1], M[2, 2] = 1.0, 2.0, 3.0
    still = EffectApproximator(M, torch.zeros(3))
    x = SideEffects(still, torch.tensor([0.0, 1.0, 0.0]), torch.ones(3)).best(10.0)
    assert x.norm().item() == pytest.approx(1)
    assert x[1].item() == pytest.approx(2 / (10 * (4 - 1)))
    assert abs(x[0].item()) == pytest.approx((1 - x[1].item() ** 2) ** 0.5)
