"""What a report is made of, as the run folder has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.scores.battles import BattleTables
from saets.scores.summary import Summary


@dataclass(frozen=True)
class Findings:
    """A run's settings and results; None where it has no such part."""

    experiment: Experiment
    manifest: Mapping[str, Any]
    goals: Sequence[Goal]
    generations: pl.DataFrame
    """The completions that the experiment asks for."""
    grades: pl.DataFrame
    """Those of the experiment's judge."""
    texts: pl.DataFrame
    """A `saets.scores.results.paired`."""
    results: pl.DataFrame
    """A `saets.scores.results.results_table`."""
    summary: Summary
    vectors: Mapping[tuple[str, str], Mapping[str, Any]]
    """What the vector file of each goal and method says of itself."""
    fit: Mapping[str, Any] | None = None
    """What fit.json says."""
    measures: pl.DataFrame | None = None
    """A `saets.scores.results.measure_table` by goal, method and scale."""
    side_effects: pl.DataFrame | None = None
    battles: BattleTables | None = None
    agreement: pl.DataFrame | None = None
    effects: pl.DataFrame | None = None
    """Columns scale and calibration of the vectors measured here."""
    failures: pl.DataFrame | None = None
    """Vectors that could not be measured, with the reasons."""
