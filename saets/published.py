"""The `.pt` files of the method's authors as tensors: nothing in them is run, and keys, shapes and numbers are checked."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saets.approximator import EffectApproximator
from saets.errors import InputError
from saets.shapes import Float

ORTHOGONAL = 1e-2
"""How far Q'Q may be from the identity, in any entry; the files come from float32 and float16."""


def read_approximator(path: Path, d_model: int) -> EffectApproximator:
    """The map of a state dict `{"W": [d_model, d_sae], "b": [d_sae]}`.

    Raises:
        InputError: a file that is damaged or wants to run code; other keys, shapes or kinds; NaN or infinity.
    """
    tensors = _tensors(path, ("W", "b"))
    W, b = tensors["W"], tensors["b"]
    if W.ndim != 2 or len(W) != d_model or b.shape != W.shape[1:]:
        raise _wrong(path, tensors, f"W [{d_model}, d_sae] and b [d_sae]")
    approximator = EffectApproximator(W.float().contiguous(), b.float().contiguous())
    _finite(path, approximator.M, approximator.b)
    return approximator


class PublishedEffects(NamedTuple):
    """Vectors and what they do; the tensors may lie on disk still."""

    vectors: Float[Tensor, "rows d_model"]
    """At the length that calibration gave them."""
    effects: Float[Tensor, "rows d_sae"]


def read_effects(path: Path, d_model: int, d_sae: int | None) -> PublishedEffects:
    """The rows of `{"features": [N, d_model], "effects": [N, d_sae]}`; `d_sae` None is any.

    Raises:
        InputError: as for `read_approximator`, but numbers are not looked at.
    """
    tensors = _tensors(path, ("features", "effects"))
    vectors, effects = tensors["features"], tensors["effects"]
    widths = (d_model, effects.shape[-1] if d_sae is None else d_sae)
    if vectors.ndim != 2 or effects.ndim != 2 or len(vectors) != len(effects) or (vectors.shape[1], effects.shape[1]) != widths:
        raise _wrong(path, tensors, f"features [N, {d_model}] and effects [N, {d_sae or 'd_sae'}]")
    return PublishedEffects(vectors, effects)


class Rotation(NamedTuple):
    """An orthogonal map from decoder rows towards columns of M: Q u(d_j) is near u(m_j)."""

    Q: Float[Tensor, "d_model d_model"]
    transposed: bool
    """Whether the file held Q'."""
    mean_cosine: float
    """Mean over features of cos(Q d_j, m_j)."""
    mean_cosine_unrotated: float


def read_rotation(path: Path, W_dec: Float[Tensor, "d_sae d_model"], M: Float[Tensor, "d_model d_sae"]) -> Rotation:
    """The rotation of a file, turned so that Q is applied from the left: which way round the file has it is measured.

    The released training script saves Q and its evaluation script applies Q'; the authors' files hold one of the two.

    Raises:
        InputError: as for `read_approximator`; a matrix that is not orthogonal, or that turns neither way towards M.
    """
    found = _load(path)
    d_model = W_dec.shape[1]
    if not isinstance(found, Tensor) or found.shape != (d_model, d_model):
        raise _wrong(path, found, f"a tensor [{d_model}, {d_model}]")
    R = found.detach().float()
    _finite(path, R)
    off = (R @ R.T - torch.eye(d_model)).abs().max().item()
    if off > ORTHOGONAL:
        raise InputError(f"{path.name} is not a rotation: R R' differs from the identity by up to {off:.3g}; get another file")

    def mean_cosine(Q: Tensor) -> float:
        return cosine_similarity(W_dec.float() @ Q.T, M.float().T, dim=-1).mean().item()

    plain, turned, unrotated = (
        mean_cosine(R),
        mean_cosine(R.T),
        cosine_similarity(W_dec.float(), M.float().T, dim=-1).mean().item(),
    )
    if max(plain, turned) <= unrotated:
        raise InputError(
            f"{path.name} turns decoder rows towards the columns of M neither as it is (mean cosine {plain:.3f}) nor transposed "
            f"({turned:.3f}); without it the mean cosine is {unrotated:.3f}: it belongs to another SAE or approximator"
        )
    return Rotation(R.T.contiguous() if turned > plain else R, turned > plain, max(plain, turned), unrotated)


def bias_direction_cosine(path: Path, approximator: EffectApproximator) -> float:
    """Cosine between the direction u(M b) in a file and that of the approximator; near 1 where they belong together.

    Raises:
        InputError: as for `read_approximator`.
    """
    found = _load(path)
    d_model = len(approximator.M)
    if not isinstance(found, Tensor) or found.shape != (d_model,):
        raise _wrong(path, found, f"a tensor [{d_model}]")
    _finite(path, found.detach())
    return cosine_similarity(found.detach().float(), normalize(approximator.M @ approximator.b, dim=0), dim=0).item()


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise InputError(
                f"{path.name} is refused: it holds more than tensors and would run code when read ({_reason(error)}); "
                "get it from a source you trust, as plain tensors"
            ) from error
        raise InputError(f"{path.name} is damaged ({_reason(error)}); fetch it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path.name} cannot be read as a .pt file ({_reason(error)}); fetch it again") from error


def _tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    found = _load(path)
    if not isinstance(found, dict) or set(found) != set(names) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _wrong(path, found, f"tensors {' and '.join(names)}")
    return {name: found[name].detach() for name in names}


def _wrong(path: Path, found: Any, expected: str) -> InputError:
    if isinstance(found, dict):
        got = ", ".join(f"{key} {_shape(value)}" for key, value in list(found.items())[:6]) or "an empty table"
    else:
        got = _shape(found)
    return InputError(f"{path.name} holds {got}; expected {expected}")


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _finite(path: Path, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise InputError(f"{path.name} holds NaN or infinity; fetch it again or get another file")


def _reason(error: BaseException) -> str:
    """The line of torch's long message that names what it met."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0][:200]
