"""A steering vector: a unit direction, where it is added, and where it came from. It travels as one safetensors file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saets.errors import InputError, unknown
from saets.records import vector_id
from saets.shapes import Float
from saets.storage import Where
from saets.tensors import read_tensors, write_tensors

FORMAT = "saets-vector"


@dataclass(frozen=True)
class SteeringVector:
    """A direction of unit length in the residual stream at `hook_name`."""

    direction: Float[Tensor, " d_model"]
    hook_name: str
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it was made: model, SAE, method, goal, features, versions."""

    def __post_init__(self) -> None:
        length = self.direction.float().norm().item()
        if not abs(length - 1) < 1e-3:
            raise InputError(
                f"a steering vector has unit length and its strength is the scale; got length {length:.6g}: "
                "use SteeringVector.from_tensor to normalise"
            )

    @property
    def id(self) -> str:
        """Hash of the direction; the `vector_id` of its rows in every table."""
        return vector_id(self.direction.numpy())

    @classmethod
    def from_tensor(cls, vector: Float[Tensor, " d_model"], hook_name: str, **provenance: Any) -> SteeringVector:
        """The vector at unit length.

        Raises:
            InputError: NaN, infinity or length zero.
        """
        length = vector.double().norm()
        if not torch.isfinite(length) or length == 0:
            raise InputError("a steering vector needs finite numbers that are not all zero")
        return cls((vector.double() / length).float(), hook_name, provenance)

    def save(self, path: Where) -> None:
        """Write direction and provenance as safetensors, whole, to a local path or a URI."""
        header = {"format": FORMAT, "hook_name": self.hook_name, "provenance": json.dumps(self.provenance, sort_keys=True)}
        write_tensors(path, {"direction": self.direction}, header)

    @classmethod
    def load(cls, path: Where) -> SteeringVector:
        """Read a file written by `save`.

        Raises:
            InputError: missing or damaged file, or one of another kind.
        """
        tensors, header = read_tensors(path, f"no vector file {path}; `saets vectors` writes the vectors of a run")
        if header.get("format") != FORMAT or "direction" not in tensors:
            raise InputError(f"{path} is not a saets vector file; expected one written by `saets vectors`")
        return cls(tensors["direction"], header["hook_name"], json.loads(header["provenance"]))

    @contextlib.contextmanager
    def applied(self, model: Any, scale: float) -> Iterator[Any]:
        """Steer a `TransformerBridge` at every position, BOS included, while the block runs; always unhooks.

        `scale` is the L2 length added to the residual stream.

        Raises:
            InputError: the model has no such hook or another width.
        """
        if self.hook_name not in model.hook_dict:
            raise unknown("hook name", self.hook_name, (f"blocks.{i}.hook_resid_post" for i in range(model.cfg.n_layers)))
        if len(self.direction) != model.cfg.d_model:
            raise InputError(
                f"the vector has {len(self.direction)} numbers, the model's residual stream {model.cfg.d_model}; "
                "it belongs to another model"
            )

        def steer(residual: Tensor, hook: Any) -> Tensor:
            return residual + (scale * self.direction).to(residual)

        with model.hooks(fwd_hooks=[(self.hook_name, steer)]):
            yield model
