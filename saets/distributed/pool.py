"""Stage 3 on Ray: a pool of actors that keep their weights, called from asyncio on the driver.

Whichever actor is free takes the next call, so batches of steered text, contrast texts and local grading share the pool, and
API grading goes on meanwhile. A call whose process died is tried again on the restarted actor a bounded number of times. A call
whose node died goes to another actor where there is no other node for its own; that one is back when a node for it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import ray
import torch

from saets.distributed.cluster import Cluster, actor_count, input_error
from saets.distributed.rollcall import BEAT_SECONDS, Board, actors_alive, answering, lost_actors, open_board
from saets.effects.worker import Failure, Measurement
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.generation import SteeringWorker
from saets.judge.local import Graded, LocalJudge
from saets.records import Generation, Grade, VectorItem
from saets.scores.disturbance import DisturbanceWorker
from saets.scores.measures import Measures, measure_texts

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Call = Callable[..., Awaitable[Any]]
"""`await call(method, *arguments)` runs a method of `SteeringActor` on the next free actor."""

TASK_RETRIES = 2

LOOK_SECONDS = 60.0
"""A call that has waited so long for a free actor looks whether there is any."""

NO_ACTOR_SECONDS = 1800.0
"""A run without any actor for so long ends instead of waiting for ever."""


class SteeringActor(SteeringWorker):
    """A `SteeringWorker` in an actor, and on demand a local judge and a worker for side effects that share its model."""

    def __init__(self, experiment: str, board: Board | None = None) -> None:
        answering(board)
        settings = Experiment.model_validate_json(experiment)
        if settings.execution.gpus_per_actor == 0:
            torch.set_num_threads(max(1, int(settings.execution.cpus_per_actor)))
        super().__init__(settings)
        self._judge: LocalJudge | None = None
        self._disturbance: DisturbanceWorker | None = None

    def ready(self) -> str:
        return ray.get_runtime_context().get_actor_id() or ""

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
        self._board: Board | None = None

    def run(self, main: Callable[[Call], Awaitable[Result]], *, calls: int) -> Result:
        """Run a coroutine that is given `call`: the result of one method call on the next free actor.

        `calls` is how many there will be; no more actors than that are started, and no more than the experiment says. They are
        started by the first call: what `main` finds wrong before costs nothing.

        Raises:
            InputError: what a worker found wrong when it loaded or ran.
            ray.exceptions.RayError: a call failed for good.
        """

        async def session() -> Result:
            turns: Turns | None = None

            async def call(method: str, *arguments: Any) -> Any:
                nonlocal turns
                if turns is None:
                    self._start(calls)
                    turns = Turns(self._actors, self._board)
                return await turns.call(method, *arguments)

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
        layout = self.cluster.layout(self.experiment)
        options: dict[str, Any] = {"max_restarts": -1, "max_task_retries": TASK_RETRIES, "scheduling_strategy": "SPREAD"}
        if layout.gpus_per_actor:
            options |= {"num_gpus": layout.gpus_per_actor}
        else:
            options |= {"num_cpus": layout.cpus_per_actor}
        actor = ray.remote(**options)(SteeringActor)
        settings = layout.applied(self.experiment).model_dump_json()
        self._board = self._board or open_board()
        while len(self._actors) < actor_count(layout, calls):
            self._actors.append(actor.remote(settings, self._board))


class Turns:
    """Calls go to the actors that are free, which an actor is once it has loaded; one that waits for a node is none of them."""

    def __init__(self, actors: Sequence[Any], board: Board) -> None:
        self._board = board
        self._free: asyncio.Queue[Actor | BaseException] = asyncio.Queue()
        self._entering = {asyncio.ensure_future(self._enter(actor)) for actor in actors}

    async def _enter(self, handle: Any) -> None:
        while True:
            try:
                self._free.put_nowait(Actor(handle, await handle.ready.remote()))
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(BEAT_SECONDS)
                continue
            except ray.exceptions.RayError as error:
                self._free.put_nowait(error)
            return

    async def call(self, method: str, *arguments: Any) -> Any:
        """The result on the next free actor, or on the one after where that is lost or out of reach."""
        tries = 0
        while True:
            actor = await self._next()
            if isinstance(actor, BaseException):
                self._free.put_nowait(actor)
                raise actor
            answer = asyncio.ensure_future(_answer(getattr(actor.handle, method).remote(*arguments)))
            lost = False
            while not lost and not answer.done():
                await asyncio.wait({answer}, timeout=BEAT_SECONDS)
                lost = not answer.done() and actor.id in await asyncio.to_thread(lost_actors, self._board)
            if not lost:
                unreached = isinstance(answer.exception(), ray.exceptions.ActorUnavailableError)
                tries += unreached
                if not unreached or tries > TASK_RETRIES:
                    self._free.put_nowait(actor)
                    return answer.result()
            logger.warning("an actor's node is gone; its work goes to the other actors until there is another for it")
            answer.cancel()
            self._entering.add(asyncio.ensure_future(self._enter(actor.handle)))

    async def _next(self) -> Actor | BaseException:
        silent = 0.0
        while silent < NO_ACTOR_SECONDS:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self._free.get(), LOOK_SECONDS)
            silent = silent + LOOK_SECONDS if await asyncio.to_thread(actors_alive, self._board) == 0 else 0.0
        raise InputError(
            f"no node for an actor in {NO_ACTOR_SECONDS / 60:g} minutes; see `ray status`, and run the same command again: "
            "everything written so far is kept"
        )


class Actor(NamedTuple):
    """An actor that has loaded."""

    handle: Any
    id: str


async def _answer(reference: Any) -> Any:
    return await reference


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
