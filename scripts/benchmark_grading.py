"""Measures how close grading comes to what the server allows, and how well it overlaps with writing.

    python scripts/benchmark_grading.py [--quick] [--latency 0.2] [--concurrency 32]

A server in a process of its own (`chat_server.py`) answers every call after a fixed time. Two measurements, both through the real
path: the openai judge, its cache of replies on disk, its log of calls, and Parquet.

1. Calls a second, against concurrency / latency, which is what a server with that latency and that many callers can answer.
2. Total time of writing and grading together, against the longer of the two. Batches of text come from a writer that only waits,
   as the driver waits for an actor on another machine, and takes as long as grading does by itself: the hardest case.

The last line is one JSON object: `calls_over_ideal` (aim: at least 0.9) and `total_over_max` (aim: at most 1.15). The client
needs processor time for each call (`cpu_ms_a_call`): where that times the rate comes near one core, the machine is the limit and
not the design, so choose a latency and a concurrency that leave it mostly idle.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from chat_server import KEY

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.experiment.config import JudgeSettings
from saets.experiment.goal import load_goal
from saets.judge.calls import CallLog
from saets.judge.openai import OpenAIJudge
from saets.records import Generation
from saets.run_folder.rows import grade_rows
from saets.run_folder.store import Appender, Table
from saets.stages.stream import Workers, written_and_graded

GOAL = load_goal("london")
BATCH = 64
"""Texts that are written together."""

AIMS = {"calls_over_ideal": 0.9, "total_over_max": 1.15}


class Timing(NamedTuple):
    """What a measurement took."""

    seconds: float
    cpu_seconds: float
    calls: int


@contextmanager
def server(latency: float) -> Iterator[str]:
    """Address of a server with that latency."""
    script = Path(__file__).with_name("chat_server.py")
    process = subprocess.Popen([sys.executable, str(script), "--latency", str(latency)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def texts(start: int, count: int) -> list[Generation]:
    """Texts of the usual length, each another."""
    words = "the river runs past the mill and the old bridge into the town where the market is held on every second day"
    return [
        Generation(f"{number}", "london", "caa", "v", 40.0, "I think", number, 7, f" {number}: {words}.")
        for number in range(start, start + count)
    ]


def graded(settings: JudgeSettings, ready: Sequence[Generation], batches: Sequence[Sequence[Generation]], pause: float) -> Timing:
    """Grade texts that are ready, and batches that a writer hands over one after another, each after a pause."""

    async def run(folder: Path) -> Timing:
        log = CallLog(folder / "calls.log")
        judge = OpenAIJudge(settings.model_copy(update={"cache": str(folder / "replies")}), log=log)
        await judge.grade(GOAL, texts(10**9, settings.concurrency))  # opens the connections
        opened = judge.server.spending.calls
        with Appender(Table(folder / "grades", ["generation_id", "criterion"]), grade_rows) as grades:

            async def write(batch: Sequence[Generation]) -> Sequence[Generation]:
                await asyncio.sleep(pause)
                return batch

            async def grade(part: Sequence[Generation]) -> None:
                found = await judge.grade(GOAL, part)
                assert all(one.score is not None for one in found)
                grades.add(found)

            start, cpu = time.perf_counter(), time.process_time()
            await written_and_graded(batches, write, ready, grade, Workers(1, settings.concurrency, 1))
            took = Timing(time.perf_counter() - start, time.process_time() - cpu, judge.server.spending.calls - opened)
        await judge.server.close()
        log.close()
        return took

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds from a call to its answer")
    parser.add_argument("--concurrency", type=int, default=32, help="calls in flight")
    options = parser.parse_args()
    os.environ |= {"OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    ideal = options.concurrency / options.latency
    batches_of = 4 if options.quick else 30
    many = batches_of * BATCH
    with server(options.latency) as address:
        settings = JudgeSettings(model="m", base_url=address, concurrency=options.concurrency)
        alone = graded(settings, texts(0, many), [], 0.0)
        rate = alone.calls / alone.seconds
        print(f"{alone.calls} calls in {alone.seconds:.2f} s: {rate:.1f}/s of {ideal:.1f}/s; load {os.getloadavg()[0]:.1f}")
        batches = [texts(many + start, BATCH) for start in range(0, many, BATCH)]
        pause = alone.seconds / batches_of
        both = graded(settings, [], batches, pause)
    writing = pause * batches_of
    print(f"writing {writing:.2f} s, grading {alone.seconds:.2f} s, both {both.seconds:.2f} s")
    facts = {
        "calls_over_ideal": rate / ideal,
        "total_over_max": both.seconds / max(writing, alone.seconds),
        "aims": AIMS,
        "latency": options.latency,
        "concurrency": options.concurrency,
        "calls_per_second": rate,
        "cpu_ms_a_call": 1000 * alone.cpu_seconds / alone.calls,
        "writing_seconds": writing,
        "grading_seconds": alone.seconds,
        "both_seconds": both.seconds,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
