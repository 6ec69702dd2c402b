"""Features of an SAE for a goal: ranked by contrast, output score or effect, each with what it fires on and what it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from torch import Tensor

from saets.errors import InputError, unknown
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.features.boosting import Booster
from saets.features.cards import CORPUS_TOKENS, Cards, pieces, shipped_cards, small_corpus, survey
from saets.features.contrast import MAINLY_EARLY, FeatureContrast, feature_contrast
from saets.features.known_effects import KnownEffect, KnownEffects
from saets.features.reading import SKIPPED, FeatureReader
from saets.run_folder.store import RunFolder
from saets.sae import check_features, load_sae, neuronpedia_link
from saets.terminal.progress import Progress, Silent

CANDIDATES = 20
"""Features with the strongest contrast; the other orders only sort these, or as many as are asked for."""

SHOWN_TOKENS = 8
"""Tokens kept of each list."""

SORTS = ("contrast", "output", "effect", "all")
"""Orders of the candidates."""


@dataclass(frozen=True)
class Search:
    """How features are looked for."""

    top: int = 10
    """Features wanted."""
    sort: str = "contrast"
    """One of `SORTS`."""
    max_density: float = 0.05
    """Features that fire on a larger share of all tokens are left out."""
    skip_positions: int = SKIPPED
    """First tokens of every text that do not count, BOS among them."""
    corpus: Sequence[str] | None = None
    """Passages that densities and contexts are of; by default those shipped with the SAE, or a small corpus."""

    def __post_init__(self) -> None:
        if self.sort not in SORTS:
            raise unknown("order of features", self.sort, SORTS)
        if self.top < 1:
            raise InputError(f"{self.top} features asked for; expected at least 1")
        if not 0 < self.max_density <= 1:
            raise InputError(
                f"the largest density is {self.max_density:g}; expected a share of all tokens, above 0 and at most 1"
            )
        if self.skip_positions < 1:
            raise InputError(f"{self.skip_positions} positions skipped; expected at least 1, which is BOS")


MOVED = pl.List(pl.Struct({"feature": pl.Int64, "effect": pl.Float64}))
COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "feature": pl.Int64,
    "contrast": pl.Float64,
    "standard_error": pl.Float64,
    "wins": pl.Float64,
    "early": pl.Float64,
    "density": pl.Float64,
    "output": pl.Float64,
    "measured": pl.Float64,
    "predicted": pl.Float64,
    "own_tokens": pl.List(pl.String),
    "raised_tokens": pl.List(pl.String),
    "measured_others": MOVED,
    "predicted_others": MOVED,
    "contexts": pl.List(pl.Struct({"activation": pl.Float64, "before": pl.String, "token": pl.String, "after": pl.String})),
    "link": pl.String,
}
"""Columns of the finder's frames, with their types."""

OF_CONTRAST = {"contrast": "mean", "standard_error": "standard_error", "wins": "wins", "early": "early"}
"""Columns that are read from a `FeatureContrast`."""


class FeatureFinder:
    """Model, SAE, and what is known of its features; writes nothing."""

    def __init__(
        self,
        experiment: Experiment,
        model: Any,
        run: RunFolder,
        *,
        search: Search | None = None,
        goal: Goal | None = None,
        progress: Progress | None = None,
    ) -> None:
        """`model` is the experiment's, as a `TransformerBridge`; the `run` may hold nothing, or effects and an approximator.

        Where densities and contexts are of a small corpus, the texts of `goal` are in it.

        Raises:
            InputError: see `load_sae`.
        """
        self.experiment, self.search = experiment, search or Search()
        self._goal, self._progress, self._tokenizer = goal, progress or Silent(), model.tokenizer
        self._booster = Booster(model, experiment.hook_name)
        decoder = self._booster.decoder
        sae = load_sae(experiment.sae, decoder.d_model, decoder.hook_device)
        self._reader = FeatureReader(decoder, sae, self.search.skip_positions)
        self.known = KnownEffects.of(experiment, run)

    def for_goal(self, goal: Goal) -> pl.DataFrame:
        """The features that fire most on what the goal is about, best first; docs/features.md describes the columns.

        Candidates are the features with the largest lower bounds, contrast minus standard error, among those that are not too
        dense and do not fire mainly at the skipped positions. They are sorted by that bound, by output score, by effect
        (predicted where there is an approximator, else measured), or by the sum of their places in all of these.

        Raises:
            InputError: no feature left, or see `feature_contrast`.
        """
        search = self.search
        contrast = feature_contrast(self._reader, self._tokenizer, goal)
        bound = contrast.mean - contrast.standard_error
        kept = (self.cards.density <= search.max_density) & (contrast.early <= MAINLY_EARLY) & (bound > 0)
        order = [int(i) for i in np.argsort(-bound, kind="stable") if kept[i]]
        if not order:
            raise InputError(
                f"no feature with a density of at most {search.max_density:g} fires more on the positive texts of goal "
                f"{goal.id!r}; allow a larger density (--max-density), or give the goal other texts"
            )
        most = search.top if search.sort == "contrast" else max(CANDIDATES, search.top)
        return _sorted(self._described(order[:most], contrast), search.sort).head(search.top)

    def describe(self, features: Sequence[int]) -> pl.DataFrame:
        """The same columns of chosen features, in the order given; those of a contrast are null.

        Raises:
            InputError: ids outside the SAE.
        """
        check_features(features, self._reader.d_sae)
        return self._described(features, None)

    @cached_property
    def cards(self) -> Cards:
        """Densities and contexts; read when first asked for."""
        corpus = self.search.corpus
        if corpus is None and (shipped := shipped_cards(self.experiment.sae)):
            return shipped
        if corpus is None:
            texts = small_corpus(self._tokenizer, self.experiment, self._goal)
        else:
            texts = pieces(self._tokenizer, corpus, CORPUS_TOKENS)
        return survey(self._reader, self._tokenizer, texts, self._progress)

    def _described(self, features: Sequence[int], contrast: FeatureContrast | None) -> pl.DataFrame:
        rows = self._reader.sae.W_dec[list(features)].detach()
        with self._progress.stage("boosting features", len(features), 0, "features") as advance:
            boosted = self._booster.boost(rows)
            advance(len(features))
        measured = self.known.measured(dict(zip(features, rows, strict=True)))
        predicted = self.known.predicted(features)
        columns: dict[str, Any] = {
            "feature": list(features),
            "density": self.cards.density[list(features)],
            "output": boosted.output.tolist(),
            "measured": [_own(measured.get(feature)) for feature in features],
            "predicted": [_own(predicted.get(feature)) for feature in features],
            "own_tokens": [self._texts(tokens) for tokens in boosted.own],
            "raised_tokens": [self._texts(tokens) for tokens in boosted.raised],
            "measured_others": [_others(measured.get(feature)) for feature in features],
            "predicted_others": [_others(predicted.get(feature)) for feature in features],
            "contexts": [[context._asdict() for context in self.cards.contexts(feature)] for feature in features],
            "link": [neuronpedia_link(self.experiment.sae, feature) for feature in features],
        }
        for name, attribute in OF_CONTRAST.items():
            columns[name] = [None] * len(features) if contrast is None else getattr(contrast, attribute)[list(features)]
        return pl.DataFrame({name: pl.Series(columns[name], dtype=dtype) for name, dtype in COLUMNS.items()})

    def _texts(self, tokens: Tensor) -> list[str]:
        return [self._tokenizer.decode([token]) for token in tokens[:SHOWN_TOKENS].tolist()]


def _own(effect: KnownEffect | None) -> float | None:
    return None if effect is None else effect.own


def _others(effect: KnownEffect | None) -> list[dict[str, Any]] | None:
    return None if effect is None else [one._asdict() for one in effect.others]


def _sorted(found: pl.DataFrame, sort: str) -> pl.DataFrame:
    """The rows by an order; equal ones stay as they are, and unknown effects come last."""
    bound, output = pl.col("contrast") - pl.col("standard_error"), pl.col("output")
    effect = pl.col("measured" if found["predicted"].null_count() == len(found) else "predicted")
    ways = {"contrast": [bound], "output": [output], "effect": [effect], "all": [bound, output, effect]}[sort]
    places = [way.fill_null(-math.inf).rank("min", descending=True) for way in ways]
    return found.sort(pl.sum_horizontal(places), maintain_order=True)
