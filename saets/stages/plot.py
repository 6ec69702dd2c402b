"""The plots of a run: of everything that it has measured and graded so far."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from saets import plots
from saets.checks import check_goals
from saets.errors import InputError, unknown
from saets.experiment.config import settings_hash
from saets.features.cards import shipped_cards
from saets.files.storage import Location
from saets.forecast.evidence import left_out_effects
from saets.plots.files import DEFAULT_FORMATS
from saets.plots.theme import SCREEN, Size
from saets.records import UNSTEERED
from saets.run_folder.fitted import Fitted, fitted
from saets.run_folder.rows import shared_baseline
from saets.run_folder.store import Table
from saets.scores.results import results_table
from saets.scores.summary import summarise
from saets.stages.results import read_outcome
from saets.stages.session import Session
from saets.vector.vector import SteeringVector

logger = logging.getLogger(__name__)

MOST_EFFECTS = 2_000_000
"""Predicted and measured effects counted at most, of whole vectors."""


@dataclass(frozen=True)
class Wanted:
    """What is to be drawn, and how."""

    goals: Sequence[str] = ()
    """By default all of the experiment's."""
    methods: Sequence[str] = ()
    """By default all of the experiment's."""
    size: Size = SCREEN
    formats: Sequence[str] = DEFAULT_FORMATS
    folder: Location | None = None
    """By default `plots` in the run folder."""


Charts = dict[str, plots.Plot]
"""By the name of their files."""


def write_plots(session: Session, wanted: Wanted | None = None) -> Location:
    """Draw every plot for which the run has data; returns their folder. A plot without is left out, with a warning that says why.

    In the run folder, plots of the same data and choice are left as they are.

    Raises:
        InputError: an unknown goal or method, or nothing to draw at all (says which stage is missing).
    """
    run, wanted = session.run, wanted or Wanted()
    goals, methods = [goal.id for goal in check_goals(session.experiment)], session.experiment.steering.methods
    for what, chosen, known in (("goal", wanted.goals, goals), ("method", wanted.methods, methods)):
        for name in chosen:
            if name not in known:
                raise unknown(what, name, known)
    folder, left_out, data = wanted.folder or run.path / "plots", [], []
    for read in (_texts, _losses, _scales, _effects, _features):
        try:
            data.append(read(session, wanted))
        except InputError as error:
            left_out.append(error)
    if not data:
        raise left_out[0]
    drawn_from = settings_hash([[one.identity for one in data], wanted.size.name, list(wanted.formats)])
    before = run.manifest().get("plots", {})
    if wanted.folder is None and before.get("drawn_from") == drawn_from and folder.is_folder():
        _say(before.get("left_out", ()))
        return folder
    charts: Charts = {}
    for one in data:
        try:
            charts |= one.draw(wanted.size)
        except InputError as error:
            left_out.append(error)
    with session.progress.stage("drawing", len(charts), 0, "plots") as advance:
        for name, chart in charts.items():
            plots.save(chart, folder, name, wanted.formats, size=wanted.size)
            advance(1)
    reasons = list(dict.fromkeys(map(str, left_out)))
    _say(reasons)
    if wanted.folder is None:
        run.update_stage("plots", {"drawn_from": drawn_from, "left_out": reasons})
    return folder


def _say(left_out: Sequence[str]) -> None:
    for reason in left_out:
        logger.warning("plots left out: %s", reason)


@dataclass(frozen=True)
class _Data:
    """What some plots are drawn from."""

    identity: Any
    """Tells it from other data."""
    draw: Callable[[Size], Charts]


def _texts(session: Session, wanted: Wanted) -> _Data:
    """Scores of graded texts."""
    experiment, texts = session.experiment, read_outcome(session).texts
    if wanted.goals:
        texts = texts.filter(pl.col("goal").is_in(list(wanted.goals)))
    if wanted.methods:
        texts = texts.filter(pl.col("method").is_in([*wanted.methods, UNSTEERED]))
    if texts["failed"].all():
        raise InputError(
            f"scores: none of {len(texts)} texts of these goals and methods has been graded; run `saets grade`, with "
            "--retry-failed where grading failed"
        )

    def draw(size: Size) -> Charts:
        table, summary = results_table(texts, seed=experiment.seed), summarise(texts, seed=experiment.seed)
        goals = table["goal"].unique(maintain_order=True).to_list()
        paper = plots.paper_scores(experiment.model.name, experiment.hook_name, goals)
        return {
            "product_by_scale": plots.product_by_scale(table, size=size),
            "coherence_behaviour": plots.coherence_behaviour(table, size=size),
            "scores": plots.score_bars(pl.concat([summary.methods, summary.overall]), paper, size=size),
            **{
                f"criteria_{method}": plots.criteria_by_scale(table, method, size=size)
                for method in table["method"].unique(maintain_order=True)
            },
        }

    return _Data(texts.hash_rows(0).to_list(), draw)


def _losses(session: Session, wanted: Wanted) -> _Data:
    """Losses that were measured when the vectors were calibrated."""
    rows: list[dict[str, Any]] = []
    steering = session.experiment.steering
    goals = wanted.goals or [goal.id for goal in check_goals(session.experiment)]
    for goal, method in itertools.product(goals, wanted.methods or steering.methods):
        path = session.run.vector(goal, method)
        scales = SteeringVector.load(path).provenance.get("scales", {}) if path.is_file() else {}
        named = {"goal": goal, "method": method, "target": _target(scales)}
        rows += [{**named, "scale": float(scale), "loss": float(loss)} for scale, loss in scales.get("losses", ())]
    if not rows:
        raise InputError(
            "loss by scale: no vector's file holds the losses of its calibration; run `saets vectors` (vectors of an older "
            "version are made anew once their files are deleted)"
        )
    schema = {"goal": pl.String, "method": pl.String, **dict.fromkeys(("scale", "loss", "target"), pl.Float64)}
    frame = pl.DataFrame(rows, schema=schema)
    return _Data(frame.rows(), lambda size: {"loss_by_scale": plots.loss_by_scale(frame, size=size)})


def _target(scales: Mapping[str, Any]) -> float | None:
    """The loss that the calibration aimed at; none where the scale was set."""
    if "target_loss" in scales:
        return float(scales["target_loss"])
    if "loss_increase" in scales and scales.get("losses"):
        return float(scales["losses"][0][1] + scales["loss_increase"])
    return None


def _scales(session: Session, wanted: Wanted) -> _Data:
    """Calibrated scales of the vectors whose effects the run knows: its own and those that come with it, or published ones."""
    run, shipped = session.run, session.shipped()
    own = [run.effects, *([shipped.effects, shipped.summed] if shipped else [])]
    tables = _read(own) or _read([run.published_effects])
    if not tables:
        raise InputError(f"calibrated scales: {run.path} holds no effects; run `saets effects`")
    effects = pl.concat(tables).unique("vector_id", keep="first", maintain_order=True).drop("vector_id")
    identity = effects.hash_rows(0).sort().to_list()
    return _Data(identity, lambda size: {"calibration": plots.calibration_histogram(effects, size=size)})


def _read(tables: Sequence[Table]) -> list[pl.DataFrame]:
    found = (table.read(["vector_id", "scale", "calibration"]) for table in tables)
    return [frame for frame in found if frame is not None]


def _effects(session: Session, wanted: Wanted) -> _Data:
    """Effects of vectors that the fit left out, predicted and measured."""
    fit = _own_fit(session)
    identity = session.run.manifest().get("fit", {}).get("inputs")
    return _Data(identity, lambda size: {"predicted_effects": plots.predicted_effects(_predictions(session, fit), size=size)})


def _features(session: Session, wanted: Wanted) -> _Data:
    """How well each feature is predicted, and how often it fires."""
    r2 = _own_fit(session).approximator.feature_r2
    if r2 is None:
        raise InputError("R2 by density: the approximator holds no R2 of features; run `saets fit` again")
    density, of = _density(session)
    features = pl.DataFrame({"density": density.astype(float), "r2": r2.double().numpy()})
    identity = features.hash_rows(0).to_list()
    return _Data(identity, lambda size: {"r2_by_density": plots.r2_by_density(features, of, size=size)})


def _own_fit(session: Session) -> Fitted:
    """The run's approximator, where it is known what it was fitted to."""
    run = session.run
    if not run.approximator.is_file():
        raise InputError(f"fit: {run.path} holds no approximator; run `saets fit`")
    fit = fitted(run, session.experiment)
    if "published" in fit.approximator.provenance:
        raise InputError(
            "fit: the approximator was published without its effects; fetch them with `saets pull --effects`, then `saets fit`"
        )
    return fit


def _predictions(session: Session, fit: Fitted) -> pl.DataFrame:
    frames, rows = [], 0
    for predicted, measured in left_out_effects(session.run, session.experiment, fit):
        some = max(0, MOST_EFFECTS // predicted.shape[1] - rows)
        rows += len(predicted)
        pairs = {"predicted": predicted[:some].flatten().numpy(), "measured": measured[:some].flatten().numpy()}
        frames.append(pl.DataFrame(pairs))
    return pl.concat(frames)


def _density(session: Session) -> tuple[np.ndarray, str]:
    """Density of each feature and what it is: from cards that come with the SAE, else the activation of unsteered text."""
    if cards := shipped_cards(session.experiment.sae):
        return cards.density, "density: share of tokens on which a feature fires"
    for run in (session.run, session.shipped()):
        if run and run.baseline.shards():
            return shared_baseline(run.baseline).mean, "mean activation on unsteered text"
    raise InputError(f"R2 by density: {session.run.path} holds no baseline; run `saets effects`")
