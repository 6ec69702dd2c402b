"""Figures of every completion that need no judge, on the actors that hold the model; a local judge leaves none to compute."""

from __future__ import annotations

import asyncio

import polars as pl

from saets.distributed.pool import Call
from saets.records import Generation
from saets.run_folder.rows import measures_rows
from saets.run_folder.store import Appender
from saets.scores.measures import Measures
from saets.stages.evaluate import wanted_generations
from saets.stages.session import Session

TEXTS_AT_ONCE = 256
"""Completions in one call."""


def measure_completions(session: Session) -> None:
    """Write the figures that are missing to `measures/`; nothing where there are no completions."""
    frame = session.run.generations.read()
    if frame is None:
        return
    wanted = wanted_generations(session, frame)
    missing = wanted.filter(~pl.col("generation_id").is_in(list(session.run.measures.ids())))
    texts = [Generation(**row) for row in missing.iter_rows(named=True)]
    batches = [texts[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE)]
    if not batches:
        return

    async def main(call: Call) -> None:
        with (
            Appender(session.run.measures, measures_rows) as out,
            session.progress.stage("measuring texts", len(wanted), len(wanted) - len(texts), "texts") as advance,
        ):

            async def measure(batch: list[Generation]) -> None:
                found: list[Measures] = await call("measure", batch)
                out.add(found)
                advance(len(found))

            async with asyncio.TaskGroup() as group:
                for batch in batches:
                    group.create_task(measure(batch))

    session.pool.run(main, calls=len(batches))
