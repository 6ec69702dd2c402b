"""SAE activations of texts, a batch after another: what counts and means over tokens stand on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saets.engine.decoder import Decoder
from saets.shapes import Bool, Float, Int

SKIPPED = 2
"""First positions of a text that do not count: BOS, whose residual stream may be a hundred times as long as others, and the token
after it, which is sometimes as long."""

TOKENS_AT_ONCE = 2048
"""Most tokens in one pass, padding included."""

NUMBERS_AT_ONCE = 2**26
"""Most activations of one pass: 256 MiB."""


class Read(NamedTuple):
    """What one pass gives."""

    texts: list[int]
    """Which texts these are."""
    tokens: Int[Tensor, "texts pos"]
    """Shorter texts are padded at their end, which no token before sees."""
    acts: Float[Tensor, "texts pos d_sae"]
    counted: Bool[Tensor, "texts pos"]
    """True at the text's own tokens after the skipped positions."""
    early: Bool[Tensor, "texts pos"]
    """True at the skipped positions, BOS first."""


@dataclass(frozen=True)
class FeatureReader:
    """A model up to the hook, and the SAE that reads there."""

    decoder: Decoder
    sae: Any
    """A SAELens SAE on the decoder's `hook_device`."""
    skip_positions: int = SKIPPED

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.cfg.d_sae)

    @torch.no_grad()
    def encode(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """f(h) in float32."""
        acts: Tensor = self.sae.encode(residual.to(self.sae.W_dec.dtype))
        return acts.float()

    def read(self, texts: Sequence[Sequence[int]]) -> Iterator[Read]:
        """Each text of tokens (BOS first) once, with texts of similar length, shortest first; tensors on the hook's device."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        most = max(min(TOKENS_AT_ONCE, NUMBERS_AT_ONCE // self.d_sae), 1)
        while order:
            taken = 1
            while taken < len(order) and (taken + 1) * len(texts[order[taken]]) <= most:
                taken += 1
            some, order = order[:taken], order[taken:]
            yield self._pass(some, [texts[i] for i in some])

    def _pass(self, numbers: list[int], texts: Sequence[Sequence[int]]) -> Read:
        longest = max(map(len, texts))
        tokens = torch.tensor([[*text, *[text[0]] * (longest - len(text))] for text in texts])
        acts = self.encode(self.decoder.lower(tokens.to(self.decoder.device)))
        position = torch.arange(longest)
        there = position < torch.tensor([len(text) for text in texts])[:, None]
        skipped = position < self.skip_positions
        return Read(numbers, *(part.to(acts.device) for part in (tokens, acts, there & ~skipped, there & skipped)))
