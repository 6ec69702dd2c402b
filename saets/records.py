"""What flows between the stages: plain rows, and the ids that make each row the same wherever it is computed."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saets.errors import InputError

Criterion = Literal["behaviour", "coherence"]
CRITERIA: tuple[Criterion, ...] = ("behaviour", "coherence")

UNSTEERED = "unsteered"
"""Method and vector id of the texts at scale 0."""


@dataclass(frozen=True)
class VectorItem:
    """A unit vector whose effect is to be measured."""

    vector_id: str
    source: str
    """Where it comes from, e.g. `decoder` or `random`."""
    index: int | None
    """Row of the source, where it has rows."""
    direction: NDArray[np.float32]
    """Unit length, [d_model]."""


@dataclass(frozen=True)
class GenerationItem:
    """A completion to make."""

    generation_id: str
    goal: str
    method: str
    vector_id: str
    scale: float
    prompt: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Generation(GenerationItem):
    """An item and its completion: the new text only, without prompt and special tokens."""

    completion: str


@dataclass(frozen=True)
class Grade:
    """One criterion of one completion."""

    generation_id: str
    criterion: Criterion
    score: float | None
    """0..1; None where grading failed, never a number instead."""
    reply: str
    """What the judge said, or the figures behind a local score."""
    error: str | None
    """Why there is no score."""
    judge: str
    """Name of the judge, with its model."""


Winner = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class BattleItem:
    """Two completions of one prompt and sample number, to be compared by one criterion, in the order in which they are shown."""

    battle_id: str
    goal: str
    criterion: Criterion
    prompt: str
    sample: int
    first: str
    """Method of the text shown first."""
    second: str
    first_id: str
    """Its generation id."""
    second_id: str

    def ended(self, winner: Winner | None, *, judge: str, reply: str = "", error: str | None = None) -> Battle:
        """This battle, fought."""
        return Battle(**asdict(self), winner=winner, reply=reply, error=error, judge=judge)


@dataclass(frozen=True)
class Battle(BattleItem):
    """An item and how it ended."""

    winner: Winner | None
    """None where the judge failed."""
    reply: str
    """What the judge said, or the two scores that were compared."""
    error: str | None
    """Why there is no winner."""
    judge: str
    """Name of the judge, with its model."""


def unit(vector: NDArray[np.floating], what: str = "vector") -> NDArray[np.float32]:
    """The vector at unit length, float32.

    Raises:
        InputError: NaN or infinity in it, or length zero.
    """
    length = float(np.linalg.norm(np.asarray(vector, dtype=np.float64)))
    if not np.isfinite(length):
        raise InputError(f"{what} holds NaN or infinity")
    if length == 0:
        raise InputError(f"{what} has length zero; it has no direction")
    return (np.asarray(vector, dtype=np.float64) / length).astype(np.float32)


def content_id(*parts: str | int | float | bytes) -> str:
    """16 hex digits that identify these parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else f"{type(part).__name__}:{part}".encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def vector_id(direction: NDArray[np.float32]) -> str:
    """The id of a unit vector: a hash of its float32 bytes."""
    return content_id(np.ascontiguousarray(direction, dtype="<f4").tobytes())
