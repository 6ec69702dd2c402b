"""A goal's contrast texts in the features of an SAE: what fires more where the behaviour is (FGAA, arXiv 2501.09929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saets.errors import InputError
from saets.experiment.goal import SIDES, Goal, contrast_tokens
from saets.features.reading import FeatureReader
from saets.shapes import Int

MAINLY_EARLY = 0.5
"""A feature with more of its activation than this at the start of texts says nothing of what they are about."""


@dataclass(frozen=True)
class FeatureContrast:
    """Activations of every feature on the contrast texts; BOS and early tokens are in `early` alone."""

    positive: NDArray[np.float32]
    """[texts, d_sae]: f(h_L) of each positive text, averaged over its tokens."""
    negative: NDArray[np.float32]
    """[texts, d_sae]: the same of the text that it is paired with."""
    early: NDArray[np.float32]
    """[d_sae]: share of a feature's activation on both sides that lies at the skipped positions; 0 where it has none."""

    @property
    def mean(self) -> NDArray[np.float32]:
        """mean f(h+) - mean f(h-), [d_sae]: over tokens, then over texts."""
        mean: NDArray[np.float32] = self._differences.mean(axis=0)
        return mean

    @property
    def standard_error(self) -> NDArray[np.float32]:
        """Of `mean`, over pairs, [d_sae]. A feature that fires on one text of all has a standard error as large as its mean."""
        error: NDArray[np.float32] = self._differences.std(axis=0, ddof=1) / np.float32(np.sqrt(len(self.positive)))
        return error

    @property
    def wins(self) -> NDArray[np.float32]:
        """Share of the pairs whose positive text fires the feature more, [d_sae]."""
        return (self._differences > 0).mean(axis=0, dtype=np.float32)

    @property
    def _differences(self) -> NDArray[np.float32]:
        return self.positive - self.negative


class ContrastTexts(NamedTuple):
    """The positive, then the negative texts as tokens."""

    tokens: list[list[int]]
    """BOS first, or the chat template's own beginning."""
    first: Int[Tensor, " texts"]
    """The first position of each that counts."""


def contrast_texts(tokenizer: Any, goal: Goal, skip_positions: int) -> ContrastTexts:
    """The goal's contrast texts without their first `skip_positions`; needs no weights.

    Raises:
        InputError: a text with no token after the skipped positions; exchanges, and a tokenizer without a chat template.
    """
    texts, starts = zip(*(found for side in SIDES for found in contrast_tokens(tokenizer, goal, side)), strict=True)
    first = torch.tensor(starts).clamp(min=skip_positions)
    left = torch.tensor([len(text) for text in texts]) - first
    if (left <= 0).any():
        short = int(left.argmin())
        raise InputError(
            f"goal {goal.id!r}: contrast text {(*goal.contrast.positive, *goal.contrast.negative)[short]!r} has "
            f"{len(texts[short])} tokens with BOS, and the first {int(first[short])} are skipped; give a longer text or skip "
            "fewer positions"
        )
    return ContrastTexts(list(texts), first)


@torch.no_grad()
def feature_contrast(reader: FeatureReader, tokenizer: Any, goal: Goal) -> FeatureContrast:
    """Every feature on the goal's contrast texts, the residual stream unsteered; of exchanges the answers alone count.

    Raises:
        InputError: see `contrast_texts`.
    """
    texts, first = contrast_texts(tokenizer, goal, reader.skip_positions)
    means = np.empty((len(texts), reader.d_sae), np.float32)
    early, total = np.zeros((2, reader.d_sae))
    for read in reader.read(texts):
        counts = read.counted & (torch.arange(read.tokens.shape[1]) >= first[read.texts, None]).to(read.counted.device)
        own = read.acts * counts[:, :, None]
        means[read.texts] = (own.sum(1) / counts.sum(1)[:, None]).cpu().numpy()
        at_start = (read.acts * read.early[:, :, None]).sum((0, 1)).cpu().numpy()
        early += at_start
        total += at_start + own.sum((0, 1)).cpu().numpy()
    share = np.divide(early, total, out=np.zeros_like(early), where=total > 0)
    pairs = len(goal.contrast.positive)
    return FeatureContrast(means[:pairs], means[pairs:], share.astype(np.float32))
