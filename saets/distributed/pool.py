"""Stage 3 on Ray: a pool of actors that keep their weights, called from asyncio on the driver.

Whichever actor is free takes the next call, so batches of steered text, contrast texts and local grading share the pool, and
API grading goes on meanwhile. A call whose process died is tried again on the restarted actor a bounded number of times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import ray
import torch

from saets.distributed.cluster import Cluster, actor_count, input_error
from saets.effects.worker import Failure, Measurement
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.generation import SteeringWorker
from saets.judge.local import Graded, LocalJudge
from saets.records import Generation, Grade, VectorItem
from saets.scores.disturbance import DisturbanceWorker
from saets.scores.measures import Measures, measure_texts

Result = TypeVar("Result")
Call = Callable[..., Awaitable[Any]]
"""`await call(method, *arguments)` runs a method of `SteeringActor` on the next free actor."""

TASK_RETRIES = 2


class SteeringActor(SteeringWorker):
    """A `SteeringWorker` in an actor, and on demand a local judge and a worker for side effects that share its model."""

    def __init__(self, experiment: str) -> None:
        settings = Experiment.model_validate_json(experiment)
        if settings.execution.gpus_per_actor == 0:
            torch.set_num_threads(max(1, int(settings.execution.cpus_per_actor)))
        super().__init__(settings)
        self._judge: LocalJudge | None = None
        self._disturbance: DisturbanceWorker | None = None

    def disturb(self, items: Sequence[VectorItem], scales: Sequence[float], rows: int | None) -> list[Measurement | Failure]:
        if self._disturbance is None:
            self._disturbance = DisturbanceWorker(self.experiment, self.model, rows)
        return self._disturbance.measure(items, scales)

    def measure(self, texts: Sequence[Generation]) -> list[Measures]:
        return measure_texts(self.model, texts, self.experiment.evaluation.prompt_format)

    def grade(self, goal: Goal, texts: Sequence[Generation]) -> Graded:
        if self._judge is None:
            settings = self.experiment
            self._judge = LocalJudge(self.model, settings.judge.embedder, settings.evaluation, seed=settings.seed)
        return self._judge.grade(goal, texts)


class SteeringPool:
    """Actors of one experiment, started when first needed and kept until the cluster is left."""

    def __init__(self, experiment: Experiment, cluster: Cluster) -> None:
        self.experiment, self.cluster = experiment, cluster
        self._actors: list[Any] = []

    def run(self, main: Callable[[Call], Awaitable[Result]], *, calls: int) -> Result:
        """Run a coroutine that is given `call`: the result of one method call on the next free actor.

        `calls` is how many there will be; no more actors than that are started, and no more than the experiment says. They are
        started by the first call: what `main` finds wrong before costs nothing.

        Raises:
            InputError: what a worker found wrong when it loaded or ran.
            ray.exceptions.RayError: a call failed for good.
        """

        async def session() -> Result:
            free: asyncio.Queue[Any] = asyncio.Queue()
            started = False

            async def call(method: str, *arguments: Any) -> Any:
                nonlocal started
                if not started:
                    self._start(calls)
                    for actor in self._actors:
                        free.put_nowait(actor)
                    started = True
                actor = await free.get()
                try:
                    return await getattr(actor, method).remote(*arguments)
                finally:
                    free.put_nowait(actor)

            return await main(call)

        try:
            return asyncio.run(session())
        except BaseExceptionGroup as group:
            first = _first(group)
            raise input_error(first) or first from group
        except ray.exceptions.RayError as error:
            raise input_error(error) or error from error

    def share(self, value: Any) -> Any:
        """A reference through which all actors read a value that is sent once."""
        self.cluster.connect()
        return ray.put(value)

    def _start(self, calls: int) -> None:
        self.cluster.connect()
        execution = self.experiment.execution
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": TASK_RETRIES, "scheduling_strategy": "SPREAD"}
        if execution.gpus_per_actor:
            options |= {"num_gpus": execution.gpus_per_actor}
        else:
            options |= {"num_cpus": execution.cpus_per_actor}
        actor = ray.remote(**options)(SteeringActor)
        settings = self.experiment.model_dump_json()
        while len(self._actors) < actor_count(execution, calls):
            self._actors.append(actor.remote(settings))


class PooledJudge:
    """The local judge, run on the pool's actors; what it measures besides is handed over."""

    def __init__(self, call: Call, name: str, measured: Callable[[list[Measures]], None]) -> None:
        self._call, self.name, self._measured = call, name, measured

    async def grade(self, goal: Goal, texts: Sequence[Generation]) -> list[Grade]:
        """Two grades a text, in order."""
        found: Graded = await self._call("grade", goal, list(texts))
        self._measured(found.measures)
        return found.grades


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
