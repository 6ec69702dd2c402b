"""Stage 5: the results table of what has been graded."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import polars as pl

from saets.checks import check_goals
from saets.distributed.tasks import spread
from saets.errors import InputError
from saets.generation import steered_positions
from saets.plots.looks import display_names
from saets.records import UNSTEERED
from saets.scores import page as results_page
from saets.scores import results
from saets.scores.agreement import agreement_table
from saets.scores.battles import BattleTables, battle_tables
from saets.scores.summary import Summary, summarise
from saets.stages.evaluate import grade_settings, wanted_generations
from saets.stages.session import Session
from saets.vector.positions import EVERYWHERE


class Outcome(NamedTuple):
    """What a run found."""

    generations: pl.DataFrame
    """The completions that this experiment asks for."""
    texts: pl.DataFrame
    """One row a completion with both criteria side by side; see `results.paired`."""
    compared: Summary
    """Goals, methods and pairs of them."""

    @property
    def summary(self) -> pl.DataFrame:
        """One row a goal and method; see `saets.scores.summary.summary_table`."""
        return self.compared.methods

    @property
    def scores(self) -> pl.DataFrame:
        """The same, and one row a method for the mean over goals."""
        return pl.concat([self.compared.methods, self.compared.overall])


def read_outcome(session: Session) -> Outcome:
    """The graded completions of this experiment, and their summary.

    Raises:
        InputError: nothing generated or graded yet; says which command to run.
    """
    generations, grades = graded_texts(session)
    texts = results.paired(generations, grades)
    return Outcome(generations, texts, summarise(texts, seed=session.experiment.seed, spread=spread))


def graded_texts(session: Session) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Completions and grades of this experiment, without those of goals, scales or judges that it no longer names."""
    run = session.run
    generations = run.generations.read()
    if generations is None:
        raise InputError(f"{run.path} holds no completions; run `saets generate` first")
    goals = check_goals(session.experiment)
    tables = [run.grades(goal.id, grade_settings(session, goal)).read() for goal in goals]
    frames = [frame for frame in tables if frame is not None]
    if not frames:
        raise InputError(f"{run.path} holds no grades of this judge; run `saets grade` first")
    return wanted_generations(session, generations), pl.concat(frames)


def write_results(session: Session) -> None:
    """Write results.parquet (scales), scores.parquet (goals x methods), comparisons.parquet (pairs) and results.md.

    And agreement.parquet where the run folder has grades of several judges.
    """
    outcome, seed = read_outcome(session), session.experiment.seed
    by_cell = results.measure_table(outcome.generations, session.run.measures.read())
    table = results.results_table(outcome.texts, seed=seed)
    write_table(session, "results", table.join(by_cell, on=("goal", "method", "prompt", "scale"), how="left"))
    write_table(session, "scores", outcome.scores)
    write_table(session, "comparisons", outcome.compared.comparisons)
    agreement = agreement_table(outcome.generations, all_grades(session), seed=seed)
    if len(agreement):
        write_table(session, "agreement", agreement)
    (session.run.path / "results.md").write_text("\n".join(_sections(session, outcome, agreement)))


def _sections(session: Session, outcome: Outcome, agreement: pl.DataFrame) -> Iterator[str]:
    """The parts of results.md for which there is something to say; what was measured of other texts or scales is left out."""
    generations = outcome.generations
    names = display_names(generations["method"])
    yield results_page.scores_section(outcome.compared, names)
    if (measures := session.run.measures.read()) is not None:
        by_scale = results.measure_table(generations, measures, ("goal", "method", "scale"))
        yield results_page.measures_section(by_scale, outcome.summary, names)
    if (side_effects := side_effects_of(session, outcome)) is not None:
        yield results_page.side_effects_section(side_effects, names)
    if (battles := battles_of(session, outcome)) is not None:
        yield results_page.battles_section(battles, names)
    if len(agreement):
        yield results_page.agreement_section(agreement)


def side_effects_of(session: Session, outcome: Outcome) -> pl.DataFrame | None:
    """Side effects measured of the vectors and scales that the outcome chose; None where there are none."""
    side_effects = _read_table(session, "side_effects")
    if side_effects is None:
        return None
    vectors = outcome.generations.select("goal", "method", "vector_id").unique()
    at_scale = outcome.summary.select("goal", "method", "scale").join(vectors, on=("goal", "method"))
    at_scale = at_scale.with_columns(pl.lit(str(steered_positions(session.experiment))).alias("positions"))
    if "positions" not in side_effects.columns:  # as all were measured before there was a choice
        side_effects = side_effects.with_columns(pl.lit(str(EVERYWHERE)).alias("positions"))
    present = side_effects.join(at_scale, on=at_scale.columns, how="semi", maintain_order="left")
    return present if len(present) else None


def battles_of(session: Session, outcome: Outcome) -> BattleTables | None:
    """What the battles between texts of the outcome say; None where there are none."""
    battles = _read_table(session, "battles")
    if battles is None:
        return None
    known = outcome.generations["generation_id"].implode()
    present = battles.filter(pl.all_horizontal(pl.col("first_id", "second_id").is_in(known)))
    return battle_tables(present, seed=session.experiment.seed, spread=spread) if len(present) else None


def _read_table(session: Session, name: str) -> pl.DataFrame | None:
    path = session.run.path / f"{name}.parquet"
    return pl.read_parquet(path.read_bytes()) if path.is_file() else None


def all_grades(session: Session) -> pl.DataFrame:
    """Grades of this experiment's goals by every judge that the run folder knows.

    Where one judge was told different things (another wording of a goal, say), each has a name of its own.
    """
    frames = []
    for goal in check_goals(session.experiment):
        tables = {settings: table.read() for settings, table in session.run.judged(goal.id).items()}
        graded = {settings: frame for settings, frame in tables.items() if frame is not None}
        names = {settings: str(frame["judge"][0]) for settings, frame in graded.items()}
        for settings, frame in graded.items():
            once = list(names.values()).count(names[settings]) == 1
            name = names[settings] if once else f"{names[settings]} ({settings[:6]})"
            frames.append(frame.with_columns(pl.lit(name).alias("judge")))
    return pl.concat(frames)


def write_table(session: Session, name: str, rows: pl.DataFrame) -> None:
    """Write NAME.parquet into the run folder, whole or not at all."""
    content = io.BytesIO()
    rows.write_parquet(content)
    (session.run.path / f"{name}.parquet").write_bytes(content.getvalue())


def samples(session: Session, *, per_method: int = 1) -> Iterable[tuple[str, str, float, str]]:
    """(goal, method, scale, prompt and completion) of some texts at each method's chosen scale, beside unsteered ones.

    An arrow stands between a user's prompt and the assistant's answer.
    """
    outcome = read_outcome(session)
    generations = outcome.generations
    between = "" if session.experiment.evaluation.prompt_format == "plain" else " -> "
    for row in outcome.summary.sort("goal", maintain_order=True).iter_rows(named=True):
        if row["scale"] is None:
            continue
        method = UNSTEERED if row["scale"] == 0 else row["method"]
        chosen = generations.filter(
            (pl.col("goal") == row["goal"]) & (pl.col("method") == method) & (pl.col("scale") == row["scale"])
        ).sort("prompt", "sample")
        for text in chosen.head(per_method).iter_rows(named=True):
            yield row["goal"], row["method"], row["scale"], between.join((text["prompt"], text["completion"]))
