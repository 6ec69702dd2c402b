"""The fit against planted maps and the normal equations written out, and files that come back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saets.errors import InputError
from saets.fit.approximator import EffectApproximator, Moments, RidgePath, choose_penalty, ridge

D_MODEL, D_SAE = 6, 9


class Rows(NamedTuple):
    """Vectors of any length, their unit vectors, and effects, in float64."""

    vectors: Tensor
    X: Tensor
    Y: Tensor


def rows(n: int, seed: int, *, noise: float = 0.0) -> Rows:
    """Effects planted by one M and b for every seed, with noise."""
    planted = torch.Generator().manual_seed(99)
    M = torch.randn(D_MODEL, D_SAE, generator=planted, dtype=torch.float64)
    b = torch.randn(D_SAE, generator=planted, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    vectors = 5 * torch.randn(n, D_MODEL, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 0, 0, 0, 0, 0])
    X = vectors / vectors.square().sum(1, keepdim=True).sqrt()
    Y = X @ M + b + noise * torch.randn(n, D_SAE, generator=generator, dtype=torch.float64)
    return Rows(vectors, X, Y)


def planted() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(99)
    M = torch.randn(D_MODEL, D_SAE, generator=generator, dtype=torch.float64)
    return M, torch.randn(D_SAE, generator=generator, dtype=torch.float64)


def moments(data: Rows) -> Moments:
    found = Moments(D_MODEL, D_SAE)
    found.add(data.vectors, data.Y)
    return found


def path(data: Rows) -> RidgePath:
    return RidgePath(moments(data))


def solved(data: Rows, penalty: float) -> tuple[Tensor, Tensor]:
    """The ridge solution by the normal equations; the penalty is in multiples of the mean eigenvalue."""
    x_mean, y_mean = data.X.mean(0), data.Y.mean(0)
    Xc, Yc = data.X - x_mean, data.Y - y_mean
    gram = Xc.T @ Xc
    strength = penalty * gram.trace() / D_MODEL
    M = torch.linalg.solve(gram + strength * torch.eye(D_MODEL, dtype=torch.float64), Xc.T @ Yc)
    return M, y_mean - x_mean @ M


def close(found: Tensor, expected: Tensor, rtol: float = 1e-5) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=rtol, atol=rtol)


def test_a_planted_map_is_recovered_exactly_from_effects_without_noise() -> None:
    found = RidgePath(moments(rows(40, 1))).fit(0.0)
    M, b = planted()
    assert found.M.dtype == found.b.dtype == torch.float32
    assert close(found.M, M)
    assert close(found.b, b)


def test_a_planted_map_is_approached_as_noisy_rows_grow_in_number() -> None:
    M, _ = planted()
    errors = [(RidgePath(moments(rows(n, 2, noise=0.5))).fit(1e-4).M - M).norm().item() for n in (50, 5000)]
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_the_fit_solves_the_normal_equations_with_an_unpenalised_intercept(penalty: float) -> None:
    data = rows(25, 3, noise=0.3)
    found = RidgePath(moments(data)).fit(penalty)
    M, b = solved(data, penalty)
    assert close(found.M, M)
    assert close(found.b, b)


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("penalty", [0.0, 1e-8, 1e-4, 1.0, 1e6])
def test_one_penalty_alone_gives_what_the_path_gives(penalty: float, n: int) -> None:
    found, expected = (
        fit(moments(rows(n, 3, noise=0.5))) for fit in (lambda m: ridge(m, penalty), lambda m: RidgePath(m).fit(penalty))
    )
    assert torch.allclose(found.M, expected.M, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.b, expected.b, rtol=1e-5, atol=1e-5)


def test_an_unbounded_penalty_leaves_the_mean_effect() -> None:
    data = rows(25, 3, noise=0.3)
    found = RidgePath(moments(data)).fit(1e12)
    assert close(found.M, torch.zeros(D_MODEL, D_SAE))
    assert close(found.b, data.Y.mean(0))


def test_a_penalty_of_zero_with_fewer_rows_than_dimensions_gives_the_solution_of_least_norm() -> None:
    data = rows(4, 4, noise=0.3)
    found = RidgePath(moments(data)).fit(0.0)
    M = torch.linalg.pinv(data.X - data.X.mean(0), rtol=1e-9) @ (data.Y - data.Y.mean(0))
    assert close(found.M, M, 1e-4)
    assert close(data.X.float() @ found.M + found.b, data.Y, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("penalty", [0.0, 1e-9, 1e-3, 1e-2])
def test_products_in_float32_leave_the_solution_what_it_is(penalty: float, dtype: torch.dtype) -> None:
    """With fewer rows than dimensions, and vectors that are the same but for the rounding of float32."""
    n, d_model, d_sae = 300, 400, 30
    generator = torch.Generator().manual_seed(23)
    vectors = torch.randn(n, d_model, generator=generator)
    vectors[-20:] = vectors[:20] / 3
    effects = (1 + torch.randn(n, d_sae, generator=generator)).to(dtype)
    rows = Moments(d_model, d_sae, block=7)
    for part in (slice(0, 100), slice(100, None)):
        rows.add(vectors[part], effects[part])
    found = ridge(rows, penalty)
    X = torch.nn.functional.normalize(vectors.double(), dim=-1)
    X, Y = X - X.mean(0), effects.double() - effects.double().mean(0)
    u, s, v = torch.linalg.svd(X, full_matrices=False)
    s = s * (s > 1e-4 * s[0])  # the twenty differences, and that of the rows' mean
    strength = penalty * s.square().sum() / d_model
    weights = torch.where(s > 0, s / (s.square() + strength), 0)
    M = v.T @ (weights[:, None] * (u.T @ Y))
    assert (found.M - M).norm() < 1e-3 * M.norm()
    assert (X @ (found.M - M)).norm() < 1e-4 * Y.norm()


def test_the_held_out_error_of_every_penalty_equals_predicting_the_rows_one_by_one() -> None:
    train, held_out = rows(30, 5, noise=0.4), rows(13, 6, noise=0.4)
    penalties = [0.0, 1e-4, 1e-2, 0.3, 1.0, 100.0]
    expected = []
    for penalty in penalties:
        M, b = solved(train, penalty)
        expected.append((held_out.Y - (held_out.X @ M + b)).square().sum().item())
    assert RidgePath(moments(train)).held_out_errors(moments(held_out), penalties) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("noise", "n"), [(0.0, 30), (3.0, 9)])
def test_the_chosen_penalty_is_the_one_of_least_held_out_error_a_number(noise: float, n: int) -> None:
    train, held_out = rows(n, 7, noise=noise), rows(50, 8, noise=noise)
    penalties = [1e-4, 1e-2, 1.0, 10.0]
    expected = {}
    for penalty in penalties:
        M, b = solved(train, penalty)
        expected[penalty] = (held_out.Y - (held_out.X @ M + b)).square().mean().item()
    best, errors = choose_penalty(path(train), moments(held_out), penalties)
    assert best == min(expected, key=expected.__getitem__)
    assert list(errors) == ["0.0001", "0.01", "1", "10"]
    assert list(errors.values()) == pytest.approx(list(expected.values()), rel=1e-6, abs=1e-12)


def test_noise_asks_for_a_larger_penalty_than_none() -> None:
    penalties = [1e-4, 1e-2, 1.0, 10.0]
    without, _ = choose_penalty(path(rows(30, 7)), moments(rows(50, 8)), penalties)
    with_noise, _ = choose_penalty(path(rows(9, 7, noise=3.0)), moments(rows(50, 8, noise=3.0)), penalties)
    assert without == 1e-4
    assert with_noise > 1e-2


def test_the_moments_of_two_parts_add_up_to_those_of_the_whole() -> None:
    whole = rows(20, 9, noise=0.2)
    first, second = (Rows(*(column[part] for column in whole)) for part in (slice(0, 7), slice(7, None)))
    in_pieces = Moments(D_MODEL, D_SAE)
    for part in (first, second):
        in_pieces.add(part.vectors, part.Y)
    summed = moments(first)
    summed += moments(second)
    for added in (summed, in_pieces):
        for mine, expected in zip(added.tensors(), moments(whole).tensors(), strict=True):
            assert torch.allclose(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.1, 3.0])
def test_weighted_rows_solve_the_weighted_normal_equations(penalty: float) -> None:
    data = rows(25, 17, noise=0.5)
    w = torch.where(torch.arange(25) % 3 == 0, 0.3, 1.0).double()
    found = Moments(D_MODEL, D_SAE)
    found.add(data.vectors, data.Y, w)
    x_mean, y_mean = w @ data.X / w.sum(), w @ data.Y / w.sum()
    Xc, Yc = data.X - x_mean, data.Y - y_mean
    gram = Xc.T @ torch.diag(w) @ Xc
    strength = penalty * gram.trace() / D_MODEL
    M = torch.linalg.solve(gram + strength * torch.eye(D_MODEL, dtype=torch.float64), Xc.T @ torch.diag(w) @ Yc)
    fitted = RidgePath(found).fit(penalty)
    assert (found.rows.item(), found.n.item()) == (25, pytest.approx(w.sum().item()))
    assert close(fitted.M, M)
    assert close(fitted.b, y_mean - x_mean @ M)


def test_rows_of_weight_zero_are_as_if_they_were_not_there() -> None:
    data = rows(20, 18, noise=0.5)
    w = (torch.arange(20) < 12).double()
    found, expected = Moments(D_MODEL, D_SAE), moments(Rows(*(column[:12] for column in data)))
    found.add(data.vectors, data.Y, w)
    for mine, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_adding_moments_makes_no_third_copy_and_leaves_the_other_as_it_was() -> None:
    first, second = moments(rows(5, 10)), moments(rows(6, 11))
    before, place = [tensor.clone() for tensor in second.tensors()], first.xy.data_ptr()
    first += second
    assert all(torch.equal(now, then) for now, then in zip(second.tensors(), before, strict=True))
    assert first.n.item() == 11
    assert first.xy.data_ptr() == place


@pytest.mark.parametrize("block", [1, 2, 4, 9, 100])
def test_a_fit_by_blocks_of_features_equals_one_of_all_at_once(block: int) -> None:
    train, held_out = (Moments(D_MODEL, D_SAE, block=block) for _ in range(2))
    for found, data in ((train, rows(30, 20, noise=0.4)), (held_out, rows(13, 21, noise=0.4))):
        found.add(data.vectors, data.Y)
        for mine, whole in zip(found.tensors(), moments(data).tensors(), strict=True):
            assert torch.allclose(mine, whole, rtol=1e-12, atol=1e-12)
    penalties = [1e-4, 0.3, 100.0]
    whole_path = path(rows(30, 20, noise=0.4))
    expected = whole_path.held_out_errors(moments(rows(13, 21, noise=0.4)), penalties)
    assert RidgePath(train).held_out_errors(held_out, penalties) == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(RidgePath(train).fit(0.3).M, whole_path.fit(0.3).M, rtol=1e-6, atol=1e-6)
    assert torch.allclose(RidgePath(train).fit(0.3).b, whole_path.fit(0.3).b, rtol=1e-6, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes; views of another's memory do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def test_beyond_the_sums_and_m_no_tensor_is_larger_than_a_block() -> None:
    """8 d_model block bytes, where the sums take 8 d_model d_sae and M half of that."""
    d_model, d_sae, block, n = 16, 4096, 64, 8
    train, held_out = (Moments(d_model, d_sae, block=block) for _ in range(2))
    generator = torch.Generator().manual_seed(22)
    vectors, effects = torch.randn(n, d_model, generator=generator), torch.randn(n, d_sae, generator=generator).half()
    with Largest() as adding:
        train.add(vectors, effects)
        held_out.add(vectors, effects)
        train += held_out
    assert adding.bytes <= max(2 * n * d_sae, 8 * d_sae), "no more than the rows given"
    with Largest() as choosing:
        choose_penalty(RidgePath(train), held_out, [0.1, 1.0])
    assert choosing.bytes <= max(8 * d_model * block, 8 * d_sae)
    with Largest() as fitting:
        RidgePath(train).fit(0.1)
    assert fitting.bytes == 4 * d_model * d_sae, "M itself"


def test_the_fit_depends_neither_on_the_order_nor_on_the_length_of_the_vectors() -> None:
    data = rows(20, 12, noise=0.2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(0.1, 400, 20, dtype=torch.float64)[:, None]
    expected = RidgePath(moments(data)).fit(0.1)
    for changed in (Rows(*(column[order] for column in data)), data._replace(vectors=data.X * lengths)):
        found = RidgePath(moments(changed)).fit(0.1)
        assert close(found.M, expected.M)
        assert close(found.b, expected.b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["vectors", "Y"])
def test_numbers_that_are_not_finite_are_refused_and_leave_the_sums_alone(where: str, bad: float) -> None:
    found = moments(rows(5, 13))
    before = [tensor.clone() for tensor in found.tensors()]
    data = rows(5, 14)
    getattr(data, where)[2, 1] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        found.add(data.vectors, data.Y)
    assert all(torch.equal(now, then) for now, then in zip(found.tensors(), before, strict=True))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_are_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"{n} rows to fit; at least 2"):
        RidgePath(moments(rows(n, 15)))


def test_a_prediction_is_the_unit_vector_times_m_plus_b_whatever_its_length() -> None:
    M, b = (tensor.float() for tensor in planted())
    data = rows(3, 16)
    found = EffectApproximator(M, b).predict(data.vectors.float())
    assert close(found, data.X @ M.double() + b.double())
    assert close(EffectApproximator(M, b).predict(data.vectors[1].float()), found[1])


def test_a_saved_approximator_comes_back_equal_with_its_provenance(tmp_path: Path) -> None:
    provenance = {"penalty": 0.01, "rows": [1, 2], "experiment": "tiny", "held_out": {"r2": 0.5}}
    M, b = (tensor.float() for tensor in planted())
    EffectApproximator(M.T.contiguous().T, b, provenance).save(tmp_path / "approximator.safetensors")
    loaded = EffectApproximator.load(tmp_path / "approximator.safetensors")
    assert torch.equal(loaded.M, M)
    assert torch.equal(loaded.b, b)
    assert loaded.provenance == provenance
    assert [path.name for path in tmp_path.iterdir()] == ["approximator.safetensors"]


def test_a_missing_a_damaged_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "approximator.safetensors"
    with pytest.raises(InputError, match="no approximator at"):
        EffectApproximator.load(path)
    M, b = (tensor.float() for tensor in planted())
    EffectApproximator(M, b).save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not safetensors at all"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a safetensors file"):
            EffectApproximator.load(path)
    for foreign in ({"W": M, "b": b}, {"M": M, "b": b[1:]}, {"M": M}):
        save_file(foreign, path)
        with pytest.raises(InputError, match="expected M"):
            EffectApproximator.load(path)


def test_moments_come_back_from_a_file_in_float32_and_give_the_same_fit(tmp_path: Path) -> None:
    before = moments(rows(40, 1, noise=0.3))
    before.save(tmp_path / "moments.safetensors")
    after = Moments.load(tmp_path / "moments.safetensors")
    assert all(torch.equal(found, saved.float().double()) for found, saved in zip(after.tensors(), before.tensors(), strict=True))
    assert close(RidgePath(after).fit(1e-3).M, RidgePath(before).fit(1e-3).M, 1e-4)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_a_file_that_holds_no_moments_is_refused(tmp_path: Path, change: str) -> None:
    before = moments(rows(40, 1))
    if change == "shape":
        before.x = before.x[:-1]
    before.save(tmp_path / "moments.safetensors")
    if change == "missing":
        save_file({"xy": before.xy}, tmp_path / "moments.safetensors")
    with pytest.raises(InputError, match="expected rows, n, x, y, xx, xy, yy"):
        Moments.load(tmp_path / "moments.safetensors")
