"""Names of steering methods: `sae_ts`, or `sae_ts:bias_weight=0` for the method with options of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pydantic import Field, ValidationError

from saets.errors import InputError, unknown
from saets.experiment.model_config import Section

METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "caa": (),
    "sae": (),
    "sae_ts": ("bias_weight",),
    "pinverse": (),
    "pinverse_raw": (),
    "rotation": ("bias_weight",),
    "fgaa": ("fgaa_features", "bias_weight"),
    "ridge": ("ridge_penalty", "ridge_target_size", "bias_weight"),
    "constrained": ("bias_weight", "constrained_gamma"),
}
"""Steering methods by the ids used in settings, files and columns, and the options that each has."""

METHOD_IDS = tuple(METHOD_OPTIONS)


class MethodOptions(Section):
    """Options of the methods; a method's own (`ridge:ridge_penalty=0.1`) go before those that are set for all."""

    bias_weight: float = 1.0
    """Lambda of SAE-TS, and of the methods built on it: how much of the direction M b is taken away."""
    fgaa_features: int = Field(4, ge=1)
    """Features that `fgaa` keeps, those that set the contrast texts apart most."""
    ridge_penalty: float = Field(1.0, ge=0)
    """Of `ridge`, in units of the mean eigenvalue of M M': 0 is the pseudoinverse, and large numbers end in SAE-TS."""
    ridge_target_size: float | None = Field(None, gt=0)
    """Tau of `ridge`: the effect asked of the target; by default that for which its path ends in SAE-TS of `bias_weight`."""
    constrained_gamma: float | None = Field(None, ge=0)
    """Weight of side effects in `constrained`; by default the largest that predicts as much of the target as SAE-TS does."""


Number = int | float


class MethodId(NamedTuple):
    """A method and the options that are its own."""

    base: str
    options: Mapping[str, Number]
    """By name, in the order of names."""

    def __str__(self) -> str:
        """The one spelling that this method has."""
        options = ",".join(f"{name}={_number(value)}" for name, value in self.options.items())
        return f"{self.base}:{options}" if options else self.base

    @property
    def words(self) -> str:
        """The options for people: `bias weight 0`."""
        told = {name.removeprefix(f"{self.base}_").replace("_", " "): value for name, value in self.options.items()}
        return ", ".join(f"{name} {_number(value)}" for name, value in told.items())

    @property
    def file_stem(self) -> str:
        """The id without colon and comma, which other tools read as something else in a file's name."""
        return str(self).replace(":", "-").replace(",", "-")


def parse_method(text: str) -> MethodId:
    """The method that is meant, however its options are ordered and its numbers are written.

    Raises:
        InputError: unknown method or option, an option given twice, a value that it cannot have.
    """
    base, colon, rest = (part.strip() for part in text.partition(":"))
    if base not in METHOD_OPTIONS:
        raise unknown("method", base, METHOD_OPTIONS)
    found: dict[str, Number] = {}
    for word in rest.split(",") if colon else ():
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals:
            raise InputError(f"method {text!r}: expected {base}:option=value, options set apart by commas; got {word!r}")
        if name not in METHOD_OPTIONS[base]:
            raise unknown(f"option of {base}", name, METHOD_OPTIONS[base])
        if name in found:
            raise InputError(f"method {text!r} gives {name} twice")
        found[name] = _value(text, name, value)
    return MethodId(base, dict(sorted(found.items())))


def _value(method: str, name: str, text: str) -> Number:
    try:
        value: Number | None = getattr(MethodOptions.model_validate({name: text}), name)
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"method {method!r}: {name} is {text!r}: {message[0].lower()}{message[1:]}") from error
    assert value is not None
    return value


def _number(value: Number) -> str:
    """The shortest text that reads back as this number."""
    return repr(value + 0.0).removesuffix(".0") if isinstance(value, float) else str(value)
