"""The authors' `.pt` files: read without running anything in them, and refused where they are not what they should be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saets.errors import InputError
from saets.fit.approximator import EffectApproximator
from saets.hub.published import bias_direction_cosine, read_approximator, read_effects, read_rotation

D_MODEL, D_SAE = 12, 40


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def linear() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"W": torch.randn(D_MODEL, D_SAE, generator=generator), "b": torch.randn(D_SAE, generator=generator)}


def test_a_state_dict_becomes_an_approximator(tmp_path: Path, linear: dict[str, Tensor]) -> None:
    trained = {name: torch.nn.Parameter(tensor) for name, tensor in linear.items()}
    found = read_approximator(saved(tmp_path / "adapter.pt", trained), D_MODEL)
    assert torch.equal(found.M, linear["W"]) and torch.equal(found.b, linear["b"])
    assert not found.M.requires_grad


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {"W": t["W"]}, r"adapter.pt holds W \[12, 40\]; expected tensors W and b of real numbers"),
        (lambda t: {**t, "b": t["b"].to_sparse()}, r"b \[40\] \(torch.sparse_coo"),
        (lambda t: {**t, "b": t["b"].to("meta")}, r"b \[40\] .*meta"),
        (lambda t: {"W": t["W"].T, "b": t["b"]}, r"holds W \[40, 12\], b \[40\]; expected W \[12, d_sae\] and b \[d_sae\]"),
        (lambda t: {"W": t["W"], "b": t["b"][:-1]}, r"b \[39\]; expected"),
        (lambda t: {"W": t["W"], "b": "text"}, r"b a str; expected tensors W and b"),
        (lambda t: t["W"], r"holds \[12, 40\]; expected tensors W and b"),
        (lambda t: {"W": t["W"], "b": t["b"] / 0}, "holds NaN or infinity"),
    ],
)
def test_wrong_keys_shapes_and_numbers_are_named(tmp_path: Path, linear: dict[str, Tensor], change: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_approximator(saved(tmp_path / "adapter.pt", change(linear)), D_MODEL)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, linear: dict[str, Tensor]) -> None:
    marker = tmp_path / "ran"
    path = saved(tmp_path / "adapter.pt", {**linear, "b": Bomb(marker)})
    with pytest.raises(InputError, match="is refused: it holds more than tensors and would run code when read .*mkdir"):
        read_approximator(path, D_MODEL)
    assert not marker.exists()


def test_a_page_in_place_of_the_file_is_not_taken_for_code(tmp_path: Path) -> None:
    path = tmp_path / "adapter.pt"
    path.write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(InputError, match="adapter.pt (is damaged|cannot be read)"):
        read_approximator(path, D_MODEL)


@pytest.mark.parametrize("keep", [0, 10, -200])
def test_half_a_file_is_said_to_be_damaged(tmp_path: Path, linear: dict[str, Tensor], keep: int) -> None:
    path = saved(tmp_path / "adapter.pt", linear)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"adapter.pt (is damaged|cannot be read).*fetch it again"):
        read_approximator(path, D_MODEL)


def test_effects_keep_their_rows_and_must_fit_each_other(tmp_path: Path) -> None:
    vectors, effects = torch.randn(5, D_MODEL), torch.randn(5, D_SAE)
    path = saved(tmp_path / "effects.pt", {"features": vectors, "effects": effects})
    found = read_effects(path, D_MODEL, D_SAE)
    assert torch.equal(found.vectors, vectors) and torch.equal(found.effects, effects)
    with pytest.raises(InputError, match=r"effects \[5, 40\]; expected features \[N, 12\] and effects \[N, 7\]"):
        read_effects(path, D_MODEL, 7)
    with pytest.raises(InputError, match=r"effects \[\]; expected"):
        read_effects(saved(path, {"features": vectors, "effects": torch.tensor(1.0)}), D_MODEL, None)
    with pytest.raises(InputError, match=r"expected features \[N, 12\] and effects \[N, d_sae\]"):
        read_effects(saved(path, {"features": vectors[:4], "effects": effects}), D_MODEL, None)


def rotated() -> tuple[Tensor, Tensor, Tensor]:
    """Decoder rows, a rotation of some 30 degrees, and a map whose columns are the rotated rows and some noise."""
    generator = torch.Generator().manual_seed(1)
    W_dec = normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=-1)
    skew = torch.randn(D_MODEL, D_MODEL, generator=generator)
    Q = torch.linalg.matrix_exp(0.2 * (skew - skew.T))
    return W_dec, Q, (W_dec @ Q.T + 0.05 * torch.randn(D_SAE, D_MODEL, generator=generator)).T


@pytest.mark.parametrize("transposed", [False, True])
def test_a_rotation_is_turned_the_way_that_reaches_the_map(tmp_path: Path, transposed: bool) -> None:
    W_dec, Q, M = rotated()
    found = read_rotation(saved(tmp_path / "R_dec.pt", Q.T.clone() if transposed else Q), W_dec, M)
    assert torch.equal(found.Q, Q)
    assert found.transposed == transposed
    by_hand = sum(torch.cosine_similarity(Q @ d, m, dim=0).item() for d, m in zip(W_dec, M.T, strict=True)) / D_SAE
    assert found.mean_cosine == pytest.approx(by_hand, abs=1e-5)
    assert found.mean_cosine_unrotated < found.mean_cosine


def test_a_rotation_that_reaches_the_map_neither_way_is_refused(tmp_path: Path) -> None:
    W_dec, _, M = rotated()
    other, _ = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(InputError, match="belongs to another SAE or approximator"):
        read_rotation(saved(tmp_path / "R.pt", other), W_dec, M)
    with pytest.raises(InputError, match="is not a rotation"):
        read_rotation(saved(tmp_path / "R.pt", 2 * other), W_dec, M)
    with pytest.raises(InputError, match="they belong to different SAEs"):
        read_rotation(saved(tmp_path / "R.pt", other), W_dec[:-1], M)
    with pytest.raises(InputError, match=r"expected a tensor \[12, 12\]"):
        read_rotation(saved(tmp_path / "R.pt", other[:5]), W_dec, M)


def test_the_bias_direction_tells_whether_files_belong_together(tmp_path: Path, linear: dict[str, Tensor]) -> None:
    approximator = EffectApproximator(linear["W"], linear["b"])
    own = normalize(linear["W"] @ linear["b"], dim=0)
    assert bias_direction_cosine(saved(tmp_path / "bias.pt", own), approximator) == pytest.approx(1, abs=1e-5)
    assert bias_direction_cosine(saved(tmp_path / "bias.pt", -own), approximator) == pytest.approx(-1, abs=1e-5)
    with pytest.raises(InputError, match=r"expected a tensor \[12\]"):
        bias_direction_cosine(saved(tmp_path / "bias.pt", own[:3]), approximator)
