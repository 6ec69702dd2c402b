"""The `.pt` files of the method's authors as tensors: nothing in them is run, and keys, shapes and numbers are checked."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saets.errors import InputError
from saets.fit.approximator import EffectApproximator
from saets.shapes import Float

ORTHOGONAL = 1e-2
"""How far Q'Q may be from the identity, in any entry; the files come from float32 and float16."""

RUNS_CODE = re.compile(r"GLOBAL|Unsupported (global|class)")
"""What torch says of a pickle that calls something."""


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
    shapes = (vectors.ndim, effects.ndim) == (2, 2) and len(vectors) == len(effects)
    if not shapes or vectors.shape[1] != d_model or d_sae not in (None, effects.shape[1]):
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


def read_rotation(path: Path, W_dec: Float[Tensor, "d_sae d_in"], M: Float[Tensor, "d_model features"]) -> Rotation:
    """The rotation of a file, turned so that Q is applied from the left: which way round the file has it is measured.

    The released training script saves Q and its evaluation script applies Q'; the authors' files hold one of the two.

    Raises:
        InputError: as for `read_approximator`; a matrix that is not orthogonal, or that turns neither way towards M.
    """
    if W_dec.shape != M.T.shape:
        raise InputError(f"the SAE's decoder is {list(W_dec.shape)} and M is {list(M.shape)}; they belong to different SAEs")
    d_model = len(M)
    R = _tensor(path, (d_model, d_model))
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
    direction = _tensor(path, (len(approximator.M),))
    return cosine_similarity(direction, normalize(approximator.M @ approximator.b, dim=0), dim=0).item()


def load_pt(path: Path) -> Any:
    """What `torch.save` wrote; nothing in the file is run.

    Raises:
        InputError: a file that is damaged or wants to run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if RUNS_CODE.search(str(error)):
            raise InputError(
                f"{path.name} is refused: it holds more than tensors and would run code when read ({_reason(error)}); "
                "get it from a source you trust, as plain tensors"
            ) from error
        raise InputError(f"{path.name} is damaged ({_reason(error)}); fetch it again") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputError(f"{path.name} cannot be read as a .pt file ({_reason(error)}); fetch it again") from error


def _tensors(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    found = load_pt(path)
    if not isinstance(found, dict) or set(found) != set(names) or not all(_plain(value) for value in found.values()):
        raise _wrong(path, found, f"tensors {' and '.join(names)} of real numbers")
    return {name: found[name].detach() for name in names}


def _tensor(path: Path, shape: tuple[int, ...]) -> Tensor:
    found = load_pt(path)
    if not _plain(found) or found.shape != shape:
        raise _wrong(path, found, f"a tensor {list(shape)} of real numbers")
    tensor: Tensor = found.detach().float()
    _finite(path, tensor)
    return tensor


def _plain(value: Any) -> bool:
    """Whether this is a dense tensor of floating-point numbers that are there."""
    return (
        isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
    )


def _wrong(path: Path, found: Any, expected: str) -> InputError:
    if isinstance(found, dict):
        got = ", ".join(f"{key} {_shape(value)}" for key, value in list(found.items())[:6]) or "an empty table"
    else:
        got = _shape(found)
    return InputError(f"{path.name} holds {got}; expected {expected}")


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return str(list(value.shape)) if _plain(value) else f"{list(value.shape)} ({value.layout}, {value.dtype}, {value.device})"


def _finite(path: Path, *tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise InputError(f"{path.name} holds NaN or infinity; fetch it again or get another file")


def _reason(error: BaseException) -> str:
    """The line of torch's long message that names what it met."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if "weights_only" not in line]  # torch's advice to run what is in the file
    named = [line for line in lines if RUNS_CODE.search(line)]
    return (named or lines or [type(error).__name__])[0][:200]
