"""A steering vector: a unit direction, where it is added, and where it came from. It travels as one safetensors file.

Vectors can be added and multiplied. A multiple or a sum has a length of its own, and is a `ScaledVector`: `60 * a + 20 * b`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saets.errors import InputError
from saets.files.storage import Where
from saets.files.tensors import read_tensors, write_tensors
from saets.hooks import layer_of
from saets.records import vector_id
from saets.shapes import Float
from saets.vector.positions import EVERYWHERE, Part, Positions
from saets.vector.steering import steerable, steered

FORMAT = "saets-vector"


@dataclass(frozen=True)
class SteeringVector:
    """A direction of unit length in the residual stream at `hook_name`.

    In sums it counts with its length, 1: `a + b` is `1 * a + 1 * b`.
    """

    direction: Float[Tensor, " d_model"]
    hook_name: str
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made: model, SAE, method, goal, features, scales, versions."""
    positions: Positions = EVERYWHERE
    """Where in a text it is added."""

    def __post_init__(self) -> None:
        length = self.direction.float().norm().item()
        if not math.isfinite(length):
            raise InputError("the direction holds NaN or infinity; a steering vector needs finite numbers")
        if not abs(length - 1) < 1e-3:
            raise InputError(
                f"a steering vector has unit length and its strength is the scale; got length {length:.6g}: "
                "use SteeringVector.from_tensor to normalise"
            )

    @property
    def id(self) -> str:
        """Hash of the direction; the `vector_id` of its rows in every table."""
        return vector_id(self.direction.numpy())

    @property
    def model(self) -> str | None:
        """Name of the model that it was made for, where that is known."""
        name = self.provenance.get("model")
        return name if isinstance(name, str) else None

    @classmethod
    def from_tensor(cls, vector: Float[Tensor, " d_model"], hook_name: str, **provenance: Any) -> SteeringVector:
        """The vector at unit length.

        Raises:
            InputError: NaN, infinity or length zero.
        """
        length = vector.double().norm()
        if not torch.isfinite(length) or length == 0:
            raise InputError("a steering vector needs finite numbers that are not all zero")
        return cls((vector.double() / length).float().cpu(), hook_name, provenance)

    def save(self, path: Where) -> None:
        """Write direction, hook, positions and provenance as safetensors, whole, to a local path or a URI."""
        header = {
            "format": FORMAT,
            "hook_name": self.hook_name,
            "positions": json.dumps(self.positions.to_json()),
            "provenance": json.dumps(self.provenance, sort_keys=True),
        }
        write_tensors(path, {"direction": self.direction}, header)

    @classmethod
    def load(cls, path: Where) -> SteeringVector:
        """Read a file written by `save`; one without positions is for every position.

        Raises:
            InputError: missing or damaged file, one of another kind, or one whose numbers are no unit vector.
        """
        tensors, header = read_tensors(path, f"no vector file {path}; `saets vectors` writes the vectors of a run")
        if header.get("format") != FORMAT or "direction" not in tensors:
            raise InputError(
                f"{path} is not a saets vector file; expected one written by `saets vectors`, or by `saets import` from a file "
                "of another tool"
            )
        try:
            positions = Positions.from_json(json.loads(header["positions"])) if "positions" in header else EVERYWHERE
            direction, provenance = tensors["direction"], read_provenance(header["provenance"])
            if direction.dtype != torch.float32 or direction.ndim != 1:
                raise InputError(f"the direction is {direction.dtype} {list(direction.shape)}; expected float32 [d_model]")
            layer_of(header["hook_name"])
            return cls(direction, header["hook_name"], provenance, positions)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is a damaged vector file: {error}; write it again") from error

    def at(self, where: Part, *, bos: bool = True) -> SteeringVector:
        """The same vector for other positions: `all`, `prompt` or `generated`, with BOS or without."""
        return replace(self, positions=Positions(where, bos))

    @contextlib.contextmanager
    def applied(self, model: Any, scale: float, *, force: bool = False) -> Iterator[Any]:
        """Steer a `TransformerBridge` or a transformers model at the vector's positions while the block runs; always unhooks.

        `scale` is the L2 length added to the residual stream. `force` lets a vector of another model through.

        Raises:
            InputError: a scale that is not finite, another model, no such hook or another width; at the end, that nothing was
                steered (see `saets.vector.steering.steered`).
        """
        if not math.isfinite(scale):
            raise InputError(f"a scale of {scale}; expected a finite number, the length that is added")
        name = steerable(model).name
        if self.model and name and not force and not same_model(self.model, name):
            raise InputError(
                f"the vector was made for {self.model!r} and the model is {name!r}; give force=True if they are the same weights"
            )
        with steered(model, self.hook_name, scale * self.direction, self.positions):
            yield model

    def __mul__(self, factor: int | float) -> ScaledVector:
        return ScaledVector(self, 1.0) * factor

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return _sum((-1.0, self)).vector

    def __add__(self, other: SteeringVector | ScaledVector) -> ScaledVector:
        return ScaledVector(self, 1.0) + other

    def __sub__(self, other: SteeringVector | ScaledVector) -> ScaledVector:
        return ScaledVector(self, 1.0) - other


def read_provenance(text: str) -> dict[str, Any]:
    """The provenance in a file's header.

    Raises:
        InputError: damaged, no table, or scales in it that are none.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"its provenance is damaged: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("scales", {}), dict):
        raise InputError("its provenance is not a table of facts, or the scales in it are not")
    scale = found.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < math.inf:
        raise InputError(f"its scale is {scale!r}; expected a number, 0 or more")
    return found


@dataclass(frozen=True)
class ScaledVector:
    """A vector with the length at which it is added, as in `60 * a + 20 * b`."""

    vector: SteeringVector
    scale: float
    """L2 length added to the residual stream; not negative."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise InputError(
                f"a scale of {self.scale}; expected a finite length, not negative: -60 * vector turns the vector round"
            )

    @property
    def added(self) -> Float[Tensor, " d_model"]:
        """What is added to the residual stream: scale x direction."""
        return self.scale * self.vector.direction

    def applied(self, model: Any, *, force: bool = False) -> contextlib.AbstractContextManager[Any]:
        """`SteeringVector.applied` at this scale."""
        return self.vector.applied(model, self.scale, force=force)

    def save(self, path: Where) -> None:
        """The file of the unit vector, with the scale in its provenance."""
        replace(self.vector, provenance={**self.vector.provenance, "scale": self.scale}).save(path)

    @classmethod
    def load(cls, path: Where) -> ScaledVector:
        """Read a file written by `save`.

        Raises:
            InputError: as for `SteeringVector.load`; a file without a scale.
        """
        vector = SteeringVector.load(path)
        scale = vector.provenance.get("scale")
        if not isinstance(scale, int | float):
            raise InputError(f"{path} holds a unit vector without a scale; use 60 * SteeringVector.load(...), or another scale")
        return cls(vector, float(scale))

    def __mul__(self, factor: int | float) -> ScaledVector:
        if not isinstance(factor, int | float):
            return NotImplemented
        if factor < 0 and self.scale > 0:
            return _sum((factor * self.scale, self.vector))
        return ScaledVector(self.vector, abs(factor) * self.scale)

    __rmul__ = __mul__

    def __neg__(self) -> ScaledVector:
        return -1.0 * self

    def __add__(self, other: SteeringVector | ScaledVector) -> ScaledVector:
        return _sum((self.scale, self.vector), _term(other)) if _is_vector(other) else NotImplemented

    def __sub__(self, other: SteeringVector | ScaledVector) -> ScaledVector:
        if not _is_vector(other):
            return NotImplemented
        weight, vector = _term(other)
        return _sum((self.scale, self.vector), (-weight, vector))


Term = tuple[float, SteeringVector]
"""A vector and its weight in a sum, of either sign."""


def _is_vector(value: object) -> bool:
    return isinstance(value, SteeringVector | ScaledVector)


def _term(vector: SteeringVector | ScaledVector) -> Term:
    return (1.0, vector) if isinstance(vector, SteeringVector) else (vector.scale, vector.vector)


def _sum(*terms: Term) -> ScaledVector:
    """The weighted sum; its provenance says of what.

    Raises:
        InputError: vectors of different hooks, positions, widths or models, or terms that cancel.
    """
    first = terms[0][1]
    for _, vector in terms[1:]:
        _check_alike(first, vector)
    weights = [weight for weight, _ in terms]
    total = sum((weight * vector.direction.double() for weight, vector in terms), torch.zeros(len(first.direction)).double())
    length = total.norm().item()
    if not length > 1e-6 * sum(map(abs, weights)):
        raise InputError("the vectors cancel: their sum has length zero, and so no direction")
    if len(terms) == 1:  # turned round, bit for bit
        direction, length = math.copysign(1, weights[0]) * first.direction, abs(weights[0])
    else:
        direction = (total / length).float()
    model = next((vector.model for _, vector in terms if vector.model), None)
    parts = [part for weight, vector in terms for part in _parts(weight, vector)]
    provenance = {"sum_of": parts, "length": length, **({"model": model} if model else {})}
    return ScaledVector(SteeringVector(direction, first.hook_name, provenance, first.positions), length)


def _parts(weight: float, vector: SteeringVector) -> list[dict[str, Any]]:
    """What a term adds to the list of a sum's parts; a sum adds its own parts."""
    made = vector.provenance
    if "sum_of" in made:
        return [{**part, "weight": part["weight"] * weight / made["length"]} for part in made["sum_of"]]
    return [{"weight": weight, "id": vector.id, "provenance": made}]


def _check_alike(one: SteeringVector, other: SteeringVector) -> None:
    for what, here, there in (
        ("hooks", one.hook_name, other.hook_name),
        ("positions", str(one.positions), str(other.positions)),
        ("widths", len(one.direction), len(other.direction)),
    ):
        if here != there:
            raise InputError(
                f"vectors of different {what} cannot be added: {here} and {there}; apply one inside the other instead"
            )
    if one.model and other.model and not same_model(one.model, other.model):
        raise InputError(f"vectors of different models cannot be added: {one.model} and {other.model}")


def same_model(one: str, other: str) -> bool:
    """Whether two names may be of one model: the last part of one is a part of the other, as in a hub name and a folder."""

    def parts(name: str) -> list[str]:
        return [part.rpartition("--")[2].lower() for part in name.rstrip("/").split("/")]

    return parts(one)[-1] in parts(other) or parts(other)[-1] in parts(one)
