"""What features fire on: their density and the contexts where they fire most, shipped with an SAE or read from a small corpus."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from saets.effects.calibration_text import passages
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import Exchange, Goal, goal_names, load_goal
from saets.experiment.model_config import Sae
from saets.features.labels import packaged_cards
from saets.features.reading import FeatureReader
from saets.shapes import Float, Int
from saets.terminal.progress import Progress
from saets.tokens import encode

BEFORE, AFTER = 12, 6
"""Tokens of a context around the one that fires."""

CONTEXTS = 5
"""Contexts kept of a feature, each of another text."""

PIECE = 64
"""Most tokens of a text that are read together, BOS included; longer texts are cut."""

CORPUS_TOKENS = 2**15
"""Most tokens of a corpus, half of it calibration text: half a minute of one CPU core for SmolLM2."""


class Context(NamedTuple):
    """Where a feature fires."""

    activation: float
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Cards:
    """Densities and contexts of all features of an SAE."""

    density: NDArray[np.float32]
    """[d_sae]: share of the tokens on which a feature fires, BOS and early positions left out."""
    contexts: Callable[[int], list[Context]]
    """Where a feature fires most, strongest first; empty where it did not."""
    source: str
    """The text that this is of."""


def shipped_cards(spec: Sae) -> Cards | None:
    """The cards that the package has of an SAE of its own; None for any other."""
    path = packaged_cards(spec)
    if path is None:
        return None
    frame = pl.read_parquet(path, columns=["feature", "density", "contexts"]).sort("feature")

    def contexts(feature: int) -> list[Context]:
        return [Context(**context) for context in frame["contexts"][feature].to_list()][:CONTEXTS]

    return Cards(frame["density"].to_numpy(), contexts, "the model's own writing (shipped with the SAE)")


def survey(reader: FeatureReader, tokenizer: Any, texts: Sequence[Sequence[int]], progress: Progress) -> Cards:
    """The cards of all features on texts of tokens, BOS first, of which the skipped positions do not count."""
    nothing = torch.zeros(reader.d_sae, CONTEXTS, device=reader.decoder.hook_device)
    peaks, fired, counted = Peaks(nothing, nothing.long(), nothing.long()), nothing[:, 0].clone(), 0
    with progress.stage("reading the corpus", len(texts), 0, "texts") as advance:
        for read in reader.read(texts):
            own = read.acts * read.counted[:, :, None]
            peaks = peaks.with_texts(read.texts, own)
            fired += (own > 0).sum((0, 1))
            counted += int(read.counted.sum())
            advance(len(read.texts))
    peaks = Peaks(*(part.cpu() for part in peaks))

    def contexts(feature: int) -> list[Context]:
        found = zip(*(part[feature].tolist() for part in peaks), strict=True)
        return [Context(value, *_around(tokenizer, texts[text], at)) for value, text, at in found if value > 0]

    return Cards((fired / max(counted, 1)).cpu().numpy(), contexts, f"a corpus of {counted} tokens")


class Peaks(NamedTuple):
    """The largest activations of each feature so far, one a text."""

    value: Float[Tensor, "d_sae contexts"]
    text: Int[Tensor, "d_sae contexts"]
    position: Int[Tensor, "d_sae contexts"]

    def with_texts(self, numbers: Sequence[int], acts: Float[Tensor, "texts pos d_sae"]) -> Peaks:
        """The largest of these and of the activations of more texts, which have these numbers."""
        value, position = acts.max(dim=1)
        text = torch.tensor(numbers, device=acts.device)[:, None].expand_as(position)
        kept = torch.cat([self.value, value.T], 1).topk(self.value.shape[1], dim=1)
        texts, positions = torch.cat([self.text, text.T], 1), torch.cat([self.position, position.T], 1)
        return Peaks(kept.values, texts.gather(1, kept.indices), positions.gather(1, kept.indices))


def _around(tokenizer: Any, tokens: Sequence[int], at: int) -> tuple[str, str, str]:
    spans = tokens[max(1, at - BEFORE) : at], tokens[at : at + 1], tokens[at + 1 : at + 1 + AFTER]
    before, token, after = (str(tokenizer.decode(list(span))) for span in spans)
    return before, token, after


def small_corpus(tokenizer: Any, experiment: Experiment, goal: Goal | None = None) -> list[list[int]]:
    """The calibration text, the texts of this goal, and those of the packaged ones, as tokens.

    Raises:
        InputError: no calibration text.
    """
    others = [load_goal(name) for name in goal_names() if goal is None or name != goal.id]
    sides = [side for one in ([goal] if goal else []) + others for side in (one.contrast, one.examples)]
    texts = [text for side in sides for text in (*side.positive, *side.negative)]
    of_goals = [text.assistant if isinstance(text, Exchange) else text for text in texts]
    calibration = pieces(tokenizer, passages(experiment.effects.calibration_text), CORPUS_TOKENS // 2)
    return [*calibration, *pieces(tokenizer, of_goals, CORPUS_TOKENS // 2)]


def corpus_file(path: Path) -> list[str]:
    """The passages of a text file, one a line.

    Raises:
        InputError: no such file, not UTF-8, or nothing in it.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"corpus {path} cannot be read ({error}); expected a text file in UTF-8, one passage a line") from error
    if not lines:
        raise InputError(f"corpus {path} is empty; expected text, one passage a line")
    return lines


def pieces(tokenizer: Any, texts: Iterable[str], most: int) -> list[list[int]]:
    """The texts in pieces of at most `PIECE` tokens, BOS in front of each, until there are `most` tokens."""
    found: list[list[int]] = []
    for piece in itertools.chain.from_iterable(_pieces(tokenizer, text) for text in texts):
        most -= len(piece)
        if most < 0:
            break
        found.append(piece)
    return found


def _pieces(tokenizer: Any, text: str) -> Iterator[list[int]]:
    bos, *tokens = encode(tokenizer, text)
    for at in range(0, len(tokens), PIECE - 1):
        yield [bos, *tokens[at : at + PIECE - 1]]
