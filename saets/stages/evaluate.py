"""Stage 4: steered text and its grades, each computed once; grading goes on while text is generated."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from operator import contains
from typing import Any

import polars as pl

from saets.checks import check_goals
from saets.distributed.pool import Call, PooledJudge
from saets.engine.sampling import row_seed
from saets.experiment.config import Experiment, settings_hash
from saets.experiment.goal import COHERENCE, Goal
from saets.experiment.loading import model_settings, sampling_settings
from saets.generation import steered_positions, texts_per_batch
from saets.judge import Judge
from saets.judge.choice import judge_identity, judge_name
from saets.judge.cost import Estimate
from saets.judge.failures import Failures
from saets.judge.openai import OpenAIJudge
from saets.judge.wording import VERSIONS
from saets.records import CRITERIA, UNSTEERED, Generation, GenerationItem, content_id
from saets.run_folder.rows import generation_rows, grade_rows, measures_rows
from saets.run_folder.store import Appender, Table
from saets.stages.asking import FREELY, Asking, check_server, opened_judge
from saets.stages.scales import scales_of
from saets.stages.session import Session
from saets.stages.stream import Workers, written_and_graded
from saets.stages.vectors import Pair, read_vectors
from saets.vector.positions import EVERYWHERE
from saets.vector.vector import SteeringVector

GRADE_BATCH = 32
"""Completions that an actor grades in one call."""

CHARACTERS_A_TOKEN = 5
"""Of steered text, by which costs are estimated before it is written."""


def evaluate(
    session: Session,
    vectors: dict[Pair, SteeringVector],
    *,
    generate: bool = True,
    grade: bool = True,
    asking: Asking = FREELY,
) -> None:
    """Generate the completions and grades that are missing; `generate` and `grade` choose one half.

    Raises:
        InputError: the judge cannot be used, or would cost more (found before any text is generated); grading had to stop: the
            ceiling is reached, too many texts fail, the judge's server refuses to go on. What was made by then is kept.
    """
    goals = {goal.id: goal for goal in check_goals(session.experiment)}
    items = generation_items(session, vectors)
    have = _read(session, {item.generation_id for item in items})
    missing = [item for item in items if item.generation_id not in have] if generate else []
    tables = grade_tables(session, goals.values()) if grade else {}
    ungraded = _ungraded(have.values(), tables, retry_failed=asking.retry_failed)
    rows = texts_per_batch(session.experiment)
    batches = [missing[start : start + rows] for start in range(0, len(missing), rows)]
    if not batches and not ungraded:
        return

    def expected(judge: OpenAIJudge) -> Estimate:
        texts = (*ungraded, *(expected_text(item, session.experiment) for item in missing))
        return judge.estimate((goals[text.goal], text) for text in texts)

    async def main(call: Call) -> None:
        settings = session.experiment.judge
        if not grade:
            await overlapped(call, None)
        elif settings.kind == "openai":
            async with opened_judge(session, asking, expected) as judge:
                await overlapped(call, judge)
        else:
            with Appender(session.run.measures, measures_rows) as measures:
                await overlapped(call, PooledJudge(call, judge_name(settings), measures.add))

    async def overlapped(call: Call, judge: Judge | None) -> None:
        directions = session.pool.share({vector.id: vector.direction.numpy() for vector in vectors.values()}) if batches else None
        failures = Failures(session.experiment.judge.max_failed, "texts could not be graded", "grade")

        def note() -> str:
            return f"{failures.failed} failed{f', {judge.server.note()}' if isinstance(judge, OpenAIJudge) else ''}"

        with ExitStack() as stack:
            texts = stack.enter_context(Appender(session.run.generations, generation_rows))
            grades = {name: stack.enter_context(Appender(table, grade_rows)) for name, table in tables.items()}
            generated = stack.enter_context(session.progress.stage("generating", len(items), len(have), "texts"))
            done = len(items) - len(missing) - len(ungraded)
            graded = stack.enter_context(session.progress.stage("grading", len(items), done, "texts", note)) if judge else None

            async def write(batch: Sequence[GenerationItem]) -> Sequence[Generation]:
                made: list[Generation] = await call("generate", batch, directions)
                texts.add(made)
                generated(len(made))
                return made if judge else ()

            async def grade_part(part: Sequence[Generation]) -> None:
                if judge is None or graded is None:
                    return
                goal = part[0].goal
                found = await judge.grade(goals[goal], part)
                grades[goal].add(found)
                graded(len(part))
                failures.add((one.generation_id, one.error) for one in found)

            await written_and_graded(batches, write, ungraded, grade_part, _workers(session, bool(batches)))

    session.pool.run(main, calls=len(batches) or _local_calls(session, len(ungraded)))


def check_grading(session: Session, asking: Asking) -> Asking:
    """Find out before anything is measured or written that the judge's server answers, and that the ceiling is high enough.

    Texts that are still to be written are counted by number, since their vectors may be yet to be built.

    Raises:
        InputError: see `opened_judge`.
    """
    if session.experiment.judge.kind == "local":
        return asking
    return check_server(session, asking, functools.partial(_whole_run, session))


def _whole_run(session: Session, judge: OpenAIJudge) -> Estimate:
    """What grading takes that a run has still before it: of texts that are there, and of as many as are to be written."""
    experiment = session.experiment
    settings, methods = experiment.evaluation, experiment.steering.methods
    goals = {goal.id: goal for goal in check_goals(experiment)}
    points = len(methods) * sum(scale > 0 for scale in settings.scales) + (0 in settings.scales)
    named = (goals, (*methods, UNSTEERED), settings.prompts)
    there = [text for text in _texts(session) if all(map(contains, named, (text.goal, text.method, text.prompt)))]
    ungraded = _ungraded(there, grade_tables(session, goals.values()), retry_failed=False)
    items = [GenerationItem("", goal, "", "", 0.0, prompt, 0, 0) for goal in goals for prompt in settings.prompts]
    one_each = judge.estimate((goals[item.goal], expected_text(item, experiment)) for item in items)
    missing = max(0, points * settings.samples * len(items) - len(there))
    return judge.estimate((goals[text.goal], text) for text in ungraded).plus(one_each.times(missing / len(items)))


def generation_items(session: Session, vectors: dict[Pair, SteeringVector]) -> list[GenerationItem]:
    """Every completion of the experiment: goals x methods x scales x prompts x samples; scale 0 once a goal, as `unsteered`.

    A vector that was left at its own length (`pinverse_raw`) is added at each scale times that length, which is the scale of the
    table then: all methods stand on one axis.
    A completion's noise is seeded by prompt and sample number alone, so methods and scales share it. Where other positions than
    all are steered, they are part of the ids of steered texts.
    """
    experiment = session.experiment
    settings, scales = experiment.evaluation, scales_of(session)
    identity = settings_hash([model_settings(experiment), experiment.hook_name, sampling_settings(experiment)])
    steered = [
        (goal, method, vector.id, scale * vector.provenance.get("raw_length", 1.0))
        for (goal, method), vector in vectors.items()
        for scale in scales
        if scale > 0
    ]
    unsteered = [(goal, UNSTEERED, UNSTEERED, 0.0) for goal in dict.fromkeys(goal for goal, _ in vectors) if 0 in scales]
    positions = steered_positions(experiment)
    steered_at = () if positions == EVERYWHERE else (str(positions),)
    items = []
    for (goal, method, vector, scale), prompt, sample in itertools.product(
        [*unsteered, *steered], settings.prompts, range(settings.samples)
    ):
        seed = row_seed(experiment.seed, "evaluation", prompt, sample)
        at = steered_at if scale else ()
        key = content_id(identity, goal, method, vector, scale, prompt, sample, seed, *at)
        items.append(GenerationItem(key, goal, method, vector, scale, prompt, sample, seed))
    return items


def wanted_generations(session: Session, generations: pl.DataFrame) -> pl.DataFrame:
    """The rows that this experiment asks for, with the vectors it has now."""
    wanted = [item.generation_id for item in generation_items(session, read_vectors(session))]
    return generations.filter(pl.col("generation_id").is_in(wanted))


def begun_texts(session: Session, vectors: dict[Pair, SteeringVector]) -> tuple[list[Generation], list[Generation]]:
    """The texts that the run has of those asked for with these vectors and unsteered; and those of them without all grades."""
    have = _read(session, {item.generation_id for item in generation_items(session, vectors)})
    tables = grade_tables(session, check_goals(session.experiment))
    return list(have.values()), _ungraded(have.values(), tables, retry_failed=False)


def grade_settings(session: Session, goal: Goal) -> str:
    """A hash of all that a grade of this goal depends on besides the text."""
    experiment = session.experiment
    told: dict[str, Any] = {"judge": judge_identity(experiment.judge), "behaviour": goal.behaviour, "coherence": COHERENCE}
    if experiment.judge.kind == "openai":
        told["template"] = VERSIONS[experiment.judge.calls]
    else:
        told |= {"examples": goal.examples.model_dump(), "model": model_settings(experiment), "seed": experiment.seed}
        told |= sampling_settings(experiment)
    return settings_hash(told)


def grade_tables(session: Session, goals: Iterable[Goal]) -> dict[str, Table]:
    """The grades of each goal by the experiment's judge."""
    return {goal.id: session.run.grades(goal.id, grade_settings(session, goal)) for goal in goals}


def _workers(session: Session, writing: bool) -> Workers:
    """As many batches as there are actors. An actor grades many texts at once; a server is asked about each text by itself, so
    that one that takes long holds up no other."""
    experiment = session.experiment
    on_actors = writing or experiment.judge.kind == "local"
    actors = session.cluster.layout(experiment).actors if on_actors else 1
    if experiment.judge.kind == "local":
        return Workers(actors, 2 * actors, GRADE_BATCH)
    return Workers(actors, experiment.judge.concurrency, 1)


def expected_text(item: GenerationItem, experiment: Experiment) -> Generation:
    """The item with a completion as long as may be expected."""
    return Generation(**asdict(item), completion="x" * (CHARACTERS_A_TOKEN * experiment.evaluation.new_tokens))


def _texts(session: Session) -> Iterator[Generation]:
    """All completions of the run."""
    frame = session.run.generations.read()
    if frame is not None:
        names = [field.name for field in fields(Generation)]
        yield from (Generation(**row) for row in frame.select(names).iter_rows(named=True))


def _read(session: Session, wanted: set[str]) -> dict[str, Generation]:
    """Completions of the run that the experiment asks for, by id."""
    return {text.generation_id: text for text in _texts(session) if text.generation_id in wanted}


def _ungraded(texts: Iterable[Generation], tables: dict[str, Table], *, retry_failed: bool) -> list[Generation]:
    """Texts without a grade for each criterion. A recorded failure counts as graded unless it is to be tried again."""
    graded = {name: _graded(table, failed=not retry_failed) for name, table in tables.items()}
    return [
        text
        for text in texts
        if text.goal in tables and not all((text.generation_id, criterion) in graded[text.goal] for criterion in CRITERIA)
    ]


def _graded(table: Table, *, failed: bool) -> set[tuple[str, str]]:
    """Text and criterion of the grades in a table, those that failed only where asked for."""
    frame = table.read(["generation_id", "criterion", "score"])
    if frame is None:
        return set()
    return set((frame if failed else frame.filter(pl.col("score").is_not_null())).select(table.key).iter_rows())


def _local_calls(session: Session, texts: int) -> int:
    return -(-texts // GRADE_BATCH) if session.experiment.judge.kind == "local" else 0
