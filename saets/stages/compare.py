"""Pairwise battles between methods, each at its chosen scale, over the same prompts and sample numbers; each fought once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import polars as pl

from saets.checks import check_goals
from saets.distributed.tasks import spread
from saets.errors import InputError, unknown
from saets.experiment.config import settings_hash
from saets.experiment.goal import COHERENCE, Goal
from saets.experiment.method_id import parse_method
from saets.judge.battle import BATTLE_VERSION, TIE_BAND, BattleQuestion, compare_scores, question_for
from saets.judge.choice import judge_identity, judge_name
from saets.judge.failures import Failures
from saets.records import CRITERIA, UNSTEERED, Battle, BattleItem, Criterion, Generation, content_id
from saets.run_folder.rows import battle_rows
from saets.run_folder.store import Appender
from saets.scores.battles import BattleTables, battle_tables
from saets.stages.asking import FREELY, Asking, opened_judge
from saets.stages.evaluate import grade_settings
from saets.stages.results import graded_texts, read_outcome, write_results, write_table
from saets.stages.session import Session

Fight = tuple[Goal, BattleItem, Generation, Generation]
"""A battle with its goal, and the texts shown first and second."""


class Wanted(NamedTuple):
    """Which battles are to be fought."""

    methods: Sequence[str] | None = None
    """Methods that fight, at least two; by default all of the experiment."""
    criteria: Sequence[Criterion] = CRITERIA
    samples: int | None = None
    """Sample numbers of a prompt, from 0; by default all."""


def compare(session: Session, wanted: Wanted, asking: Asking = FREELY) -> BattleTables:
    """Fight the battles that are missing and write battles.parquet, strengths.parquet and results.md.

    A failed battle counts as fought, and is fought again only where that is asked for.

    Raises:
        InputError: fewer than two methods, unknown ones, ones without graded texts; a judge that cannot be used, or would cost
            more than it may; comparing had to stop. Battles fought by then are kept.
    """
    goals = {goal.id: goal for goal in check_goals(session.experiment)}
    items, texts = battle_items(session, goals, wanted)
    fought = session.run.battles.read()
    if fought is not None and asking.retry_failed:
        fought = fought.drop_nulls("winner")
    done = set() if fought is None else set(fought["battle_id"])
    missing = [item for item in items if item.battle_id not in done]
    if missing:
        fights = [(goals[item.goal], item, texts[item.first_id], texts[item.second_id]) for item in missing]
        local = session.experiment.judge.kind == "local"
        asyncio.run(_by_scores(session, fights, len(items)) if local else _asked(session, fights, len(items), asking))
    return _write(session, [item.battle_id for item in items])


def battle_items(session: Session, goals: dict[str, Goal], wanted: Wanted) -> tuple[list[BattleItem], dict[str, Generation]]:
    """Every battle: goals x criteria x pairs of methods x prompts x samples, in both orders; and the texts by id.

    An even sample fights with its text at the scale that the odd ones chose, and the other way round: no text has a say in the
    scale at which it is judged. Where there are no halves it is the scale that all samples chose. Scale 0 is the unsteered text.
    """
    methods = _methods(session, wanted)
    outcome = read_outcome(session)
    places, rows = _places(outcome.summary, methods), outcome.generations
    if wanted.samples is not None:
        rows = rows.filter(pl.col("sample") < wanted.samples)
    names = [field.name for field in fields(Generation)]
    texts = {row["generation_id"]: Generation(**row) for row in rows.select(names).iter_rows(named=True)}
    by_place = {(text.goal, text.method, text.scale, text.prompt, text.sample): key for key, text in texts.items()}
    samples = sorted({(text.prompt, text.sample) for text in texts.values()})
    identity = {goal: _identity(session, of_goal) for goal, of_goal in goals.items()}
    items = []
    for goal, criterion, (one, other), (prompt, sample) in itertools.product(
        goals, wanted.criteria, itertools.combinations(methods, 2), samples
    ):
        ids = {}
        for method in (one, other):
            scale = places[goal, method][sample % 2]
            ids[method] = by_place.get((goal, method if scale else UNSTEERED, scale, prompt, sample))
        for first, second in ((one, other), (other, one)):
            first_id, second_id = ids[first], ids[second]
            if first_id is not None and second_id is not None:
                key = content_id(identity[goal], criterion, first, second, first_id, second_id)
                items.append(BattleItem(key, goal, criterion, prompt, sample, first, second, first_id, second_id))
    return items, texts


def _methods(session: Session, wanted: Wanted) -> list[str]:
    known = session.experiment.steering.methods
    methods = list(dict.fromkeys(str(parse_method(method)) for method in wanted.methods or known))
    for method in methods:
        if method not in known:
            raise unknown("method of this experiment", method, known)
    if len(methods) < 2:
        raise InputError(f"a battle needs two methods; got {', '.join(methods)}: name more, or add some to steering.methods")
    return methods


def _places(summary: pl.DataFrame, methods: Sequence[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """Scales of each goal and method: for even and for odd samples."""
    places = {}
    for row in summary.iter_rows(named=True):
        halves = (row["scale_odd"], row["scale_even"])
        scales = halves if None not in halves else (row["scale"], row["scale"])
        if row["method"] in methods and scales[0] is None:
            raise InputError(f"goal {row['goal']!r}, method {row['method']!r} has no graded text; run `saets grade` first")
        places[row["goal"], row["method"]] = scales
    return places


def _identity(session: Session, goal: Goal) -> str:
    """A hash of all that a battle of this goal depends on besides criterion and texts."""
    judge = session.experiment.judge
    if judge.kind == "local":
        return settings_hash([grade_settings(session, goal), TIE_BAND])
    return settings_hash([judge_identity(judge), goal.behaviour, COHERENCE, BATTLE_VERSION])


async def _asked(session: Session, fights: Sequence[Fight], total: int, asking: Asking) -> None:
    """Has the model behind the server compare."""
    async with opened_judge(session, asking, lambda judge: judge.estimate_of(_questions(fights))) as judge:

        async def fight(one: Fight) -> Battle:
            item = one[1]
            if _equal(one):
                return item.ended("tie", judge=judge.name)
            winner, reply, error = await judge.answer(question_for(*one))
            return item.ended(winner, judge=judge.name, reply=reply, error=error)

        await _fought(session, fights, total, fight, judge.server.note)


def _questions(fights: Sequence[Fight]) -> Iterator[BattleQuestion]:
    """What is to be asked, each message once: battles of the same texts share a reply."""
    seen: set[str] = set()
    for question in (question_for(*fight) for fight in fights if not _equal(fight)):
        key = content_id(question.message)
        if key not in seen:
            seen.add(key)
            yield question


async def _by_scores(session: Session, fights: Sequence[Fight], total: int) -> None:
    """Compares the local judge's own grades."""
    grades = graded_texts(session)[1]
    scores = {
        (key, criterion): score for key, criterion, score in grades.select("generation_id", "criterion", "score").iter_rows()
    }
    name = judge_name(session.experiment.judge)

    async def fight(one: Fight) -> Battle:
        item = one[1]
        first, second = (scores.get((key, item.criterion)) for key in (item.first_id, item.second_id))
        return compare_scores(item, first, second, name)

    await _fought(session, fights, total, fight)


async def _fought(
    session: Session,
    fights: Sequence[Fight],
    total: int,
    fight: Callable[[Fight], Awaitable[Battle]],
    note: Callable[[], str] | None = None,
) -> None:
    """Fights all, as many at once as the judge may have calls in flight, and keeps each as it ends."""
    settings, left = session.experiment.judge, iter(fights)
    failures = Failures(settings.max_failed, "battles could not be decided", "compare")
    with (
        Appender(session.run.battles, battle_rows) as out,
        session.progress.stage("comparing", total, total - len(fights), "battles", note) as advance,
    ):

        async def fight_on() -> None:
            for which in left:
                battle = await fight(which)
                out.add([battle])
                advance(1)
                failures.add([(battle.battle_id, battle.error)])

        tasks = [asyncio.ensure_future(fight_on()) for _ in range(min(settings.concurrency, len(fights)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


def _equal(fight: Fight) -> bool:
    """Equal completions tie without a call."""
    _, _, first, second = fight
    return first.completion == second.completion


def _write(session: Session, ids: Sequence[str]) -> BattleTables:
    fought = session.run.battles.read()
    if fought is None:
        raise InputError("there is no pair of texts to compare; give a higher --samples, or run `saets evaluate` first")
    fought = fought.filter(pl.col("battle_id").is_in(ids))
    tables = battle_tables(fought, seed=session.experiment.seed, spread=spread)
    write_table(session, "battles", fought)
    write_table(session, "strengths", tables.strengths)
    write_results(session)
    return tables
