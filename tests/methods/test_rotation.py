"""The rotation from decoder rows to columns of M: recovered where it is planted, and the best of all orthogonal matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saets.errors import InputError
from saets.methods.rotation import procrustes

D_MODEL, D_SAE = 12, 100


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed: int) -> Tensor:
    return torch.linalg.qr(random(D_MODEL, D_MODEL, seed=seed)).Q


def distance(Q: Tensor, W_dec: Tensor, M: Tensor) -> float:
    """sum_j ||Q u(d_j) - u(m_j)||^2, long-hand."""
    return sum(((Q @ (d / d.norm()) - m / m.norm()).square().sum().item()) for d, m in zip(W_dec, M.T, strict=True))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("reflected", [False, True])
def test_a_planted_rotation_or_reflection_is_recovered_and_applied_from_the_left(seed: int, reflected: bool) -> None:
    W_dec, Q = random(D_SAE, D_MODEL, seed=10 + seed), orthogonal(seed)
    if (torch.linalg.det(Q) < 0) != reflected:
        Q = torch.cat([-Q[:1], Q[1:]])
    M = (W_dec @ Q.T).T * (1 + random(D_SAE, seed=20 + seed).abs())
    assert torch.allclose(procrustes(W_dec, M), Q, atol=1e-5)


def test_it_is_better_than_the_identity_its_transpose_and_other_orthogonal_matrices() -> None:
    W_dec, planted = random(D_SAE, D_MODEL, seed=4), orthogonal(5)
    M = (W_dec @ planted.T).T + 1.5 * random(D_MODEL, D_SAE, seed=6)
    Q = procrustes(W_dec, M)
    found = distance(Q, W_dec, M)
    assert torch.allclose(Q @ Q.T, torch.eye(D_MODEL), atol=1e-5)
    others = [torch.eye(D_MODEL), Q.T, planted, *(orthogonal(seed) for seed in range(30, 50))]
    assert all(found < distance(other, W_dec, M) for other in others)


def test_lengths_of_rows_and_columns_do_not_count_and_empty_ones_count_for_nothing() -> None:
    W_dec, M = random(D_SAE, D_MODEL, seed=7), random(D_MODEL, D_SAE, seed=8)
    lengths = 1 + random(D_SAE, seed=9).abs()
    assert torch.allclose(procrustes(W_dec * lengths[:, None], M * lengths.flip(0)), procrustes(W_dec, M), atol=1e-5)
    empty = M.clone()
    empty[:, 5] = 0
    rest = [j for j in range(D_SAE) if j != 5]
    assert torch.allclose(procrustes(W_dec, empty), procrustes(W_dec[rest], M[:, rest]), atol=1e-5)


def test_a_decoder_of_another_sae_is_refused() -> None:
    with pytest.raises(InputError, match=r"decoder is \[100, 12\] and M is \[12, 99\]"):
        procrustes(random(D_SAE, D_MODEL, seed=1), random(D_MODEL, D_SAE - 1, seed=2))
