"""Which positions of a text are steered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from saets.errors import InputError, unknown

Part = Literal["all", "prompt", "generated"]


@dataclass(frozen=True)
class Positions:
    """Where a vector is added. BOS is the first position of a text, whatever token stands there; it belongs to the prompt."""

    where: Part = "all"
    """`all`, `prompt` (the tokens that were given) or `generated` (those that the model wrote)."""
    bos: bool = True
    """Whether BOS is steered too; always False for `generated`."""

    def __post_init__(self) -> None:
        if self.where not in get_args(Part):
            raise unknown("positions", str(self.where), get_args(Part))
        if self.where == "generated":
            object.__setattr__(self, "bos", False)

    @property
    def everywhere(self) -> bool:
        """Whether no position is left out."""
        return self.where == "all" and self.bos

    def __str__(self) -> str:
        named = {"all": "every position", "prompt": "the prompt", "generated": "generated tokens"}[self.where]
        return named if self.bos or self.where == "generated" else f"{named} without BOS"

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {"where": self.where, "bos": self.bos}

    @classmethod
    def from_json(cls, value: Any) -> Positions:
        """Read what `to_json` gave.

        Raises:
            InputError: anything else.
        """
        known = isinstance(value, dict) and value.keys() == {"where", "bos"} and value["where"] in get_args(Part)
        if not known or not isinstance(value["bos"], bool):
            raise InputError(f"positions are {value!r}; expected where (all, prompt or generated) and bos (true or false)")
        return cls(value["where"], value["bos"])


EVERYWHERE = Positions()
"""Every position, BOS included: how effects are measured."""
