"""Stage 4: steered text and its grades, each computed once; grading goes on while text is generated."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import polars as pl

from saets.checks import check_goals
from saets.config import settings_hash
from saets.distributed.pool import Call, PooledJudge
from saets.engine.sampling import row_seed
from saets.experiment import model_settings, sampling_settings
from saets.generation import texts_per_batch
from saets.goal import COHERENCE, Goal
from saets.judge import Judge
from saets.judge.choice import judge_name
from saets.judge.openai import TEMPLATE_VERSION, OpenAIJudge
from saets.progress import Advance
from saets.records import CRITERIA, UNSTEERED, Generation, GenerationItem, Grade, content_id
from saets.rows import generation_rows, grade_rows
from saets.stages.session import Session
from saets.stages.vectors import Pair, read_vectors
from saets.store import Appender, Table
from saets.vector import SteeringVector

GRADE_BATCH = 32
"""Completions graded in one call."""


def evaluate(session: Session, vectors: dict[Pair, SteeringVector], *, generate: bool = True, grade: bool = True) -> None:
    """Generate the completions and grades that are missing; `generate` and `grade` choose one half.

    Raises:
        InputError: the judge cannot be used (found before any text is generated).
    """
    goals = {goal.id: goal for goal in check_goals(session.experiment)}
    items = generation_items(session, vectors)
    have = _read(session, {item.generation_id for item in items})
    missing = [item for item in items if item.generation_id not in have] if generate else []
    tables = {name: session.run.grades(name, grade_settings(session, goal)) for name, goal in goals.items()} if grade else {}
    ungraded = _ungraded(have.values(), tables)
    rows = texts_per_batch(session.experiment)
    batches = [missing[start : start + rows] for start in range(0, len(missing), rows)]
    if not batches and not ungraded:
        return

    async def main(call: Call) -> None:
        judge = await _open_judge(session, call) if grade else None
        try:
            await overlapped(call, judge)
        finally:
            if isinstance(judge, OpenAIJudge):
                await judge.close()

    async def overlapped(call: Call, judge: Judge | None) -> None:
        directions = session.pool.share({vector.id: vector.direction.numpy() for vector in vectors.values()})
        with ExitStack() as stack:
            texts = stack.enter_context(Appender(session.run.generations, generation_rows))
            grades = {name: stack.enter_context(Appender(table, grade_rows)) for name, table in tables.items()}
            generated = stack.enter_context(session.progress.stage("generating", len(items), len(have), "texts"))
            todo = len(missing) + len(ungraded)
            graded = (
                stack.enter_context(session.progress.stage("grading", len(items), len(items) - todo, "texts")) if judge else None
            )

            async def grade_texts(made: Sequence[Generation]) -> None:
                if judge is None or graded is None:
                    return
                async with asyncio.TaskGroup() as group:
                    for name, part in _parts(made):
                        group.create_task(_grade(judge, goals[name], part, grades[name], graded))

            async def generate_batch(batch: Sequence[GenerationItem]) -> None:
                made: list[Generation] = await call("generate", batch, directions)
                texts.add(made)
                generated(len(made))
                await grade_texts(made)

            async with asyncio.TaskGroup() as group:
                group.create_task(grade_texts(ungraded))
                for batch in batches:
                    group.create_task(generate_batch(batch))

    session.pool.run(main, calls=len(batches) or _local_calls(session, len(ungraded)))


def generation_items(session: Session, vectors: dict[Pair, SteeringVector]) -> list[GenerationItem]:
    """Every completion of the experiment: goals x methods x scales x prompts x samples; scale 0 once a goal, as `unsteered`.

    A vector that was left at its own length (`pinverse_raw`) is added at each scale times that length, which is the scale of the
    table then: all methods stand on one axis.
    A completion's noise is seeded by prompt and sample number alone, so methods and scales share it.
    """
    experiment = session.experiment
    settings = experiment.evaluation
    identity = settings_hash([model_settings(experiment), experiment.hook_name, sampling_settings(experiment)])
    steered = [
        (goal, method, vector.id, scale * vector.provenance.get("raw_length", 1.0))
        for (goal, method), vector in vectors.items()
        for scale in settings.scales
        if scale > 0
    ]
    unsteered = [(goal, UNSTEERED, UNSTEERED, 0.0) for goal in dict.fromkeys(goal for goal, _ in vectors) if 0 in settings.scales]
    items = []
    for (goal, method, vector, scale), prompt, sample in itertools.product(
        [*unsteered, *steered], settings.prompts, range(settings.samples)
    ):
        seed = row_seed(experiment.seed, "evaluation", prompt, sample)
        key = content_id(identity, goal, method, vector, scale, prompt, sample, seed)
        items.append(GenerationItem(key, goal, method, vector, scale, prompt, sample, seed))
    return items


def wanted_generations(session: Session, generations: pl.DataFrame) -> pl.DataFrame:
    """The rows that this experiment asks for, with the vectors it has now."""
    wanted = [item.generation_id for item in generation_items(session, read_vectors(session))]
    return generations.filter(pl.col("generation_id").is_in(wanted))


def grade_settings(session: Session, goal: Goal) -> str:
    """A hash of all that a grade of this goal depends on besides the text."""
    experiment = session.experiment
    told: dict[str, Any] = {"judge": judge_name(experiment.judge), "behaviour": goal.behaviour, "coherence": COHERENCE}
    if experiment.judge.kind == "openai":
        told["template"] = TEMPLATE_VERSION
    else:
        told |= {"examples": goal.examples.model_dump(), "model": model_settings(experiment), "seed": experiment.seed}
        told |= sampling_settings(experiment)
    return settings_hash(told)


async def _open_judge(session: Session, call: Call) -> Judge:
    settings = session.experiment.judge
    if settings.kind == "local":
        return PooledJudge(call, judge_name(settings))
    judge = OpenAIJudge(settings)
    await judge.check()
    return judge


async def _grade(judge: Judge, goal: Goal, texts: Sequence[Generation], out: Appender[Grade], advance: Advance) -> None:
    out.add(await judge.grade(goal, texts))
    advance(len(texts))


def _parts(texts: Sequence[Generation]) -> list[tuple[str, list[Generation]]]:
    """The texts by goal, in parts of `GRADE_BATCH`."""
    by_goal: dict[str, list[Generation]] = {}
    for text in texts:
        by_goal.setdefault(text.goal, []).append(text)
    return [
        (goal, part[start : start + GRADE_BATCH]) for goal, part in by_goal.items() for start in range(0, len(part), GRADE_BATCH)
    ]


def _read(session: Session, wanted: set[str]) -> dict[str, Generation]:
    """Completions of the run that the experiment asks for, by id."""
    frame = session.run.generations.read()
    if frame is None:
        return {}
    names = [field.name for field in fields(Generation)]
    found = (Generation(**row) for row in frame.select(names).iter_rows(named=True))
    return {text.generation_id: text for text in found if text.generation_id in wanted}


def _ungraded(texts: Any, tables: dict[str, Table]) -> list[Generation]:
    """Texts without a grade for each criterion. A recorded failure counts as graded: it is kept, and shown."""
    graded = {name: table.ids() for name, table in tables.items()}
    return [
        text
        for text in texts
        if text.goal in tables and not all((text.generation_id, criterion) in graded[text.goal] for criterion in CRITERIA)
    ]


def _local_calls(session: Session, texts: int) -> int:
    return -(-texts // GRADE_BATCH) if session.experiment.judge.kind == "local" else 0
