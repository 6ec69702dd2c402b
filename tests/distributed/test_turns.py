"""Who is called next: actors that have loaded and whose node is there, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray

from saets.distributed import pool
from saets.distributed.pool import Turns
from saets.errors import InputError

NEVER: Any = asyncio.Event


class Remote:
    """A method of an actor."""

    def __init__(self, act: Callable[..., Awaitable[Any]]) -> None:
        self.remote = act


class Fake:
    """An actor that answers with its name and what it was asked; one that is `stuck` never answers, `loading` never loads, and
    the first so many calls of any kind find it `unreached`."""

    def __init__(
        self, name: str, *, stuck: bool = False, loading: bool = False, broken: bool = False, unreached: int = 0
    ) -> None:
        left = iter(range(unreached))

        def reach() -> None:
            if next(left, None) is not None:
                raise ray.exceptions.ActorUnavailableError("no connection", None)

        async def ready() -> str:
            reach()
            if broken:
                raise ray.exceptions.RayActorError
            if loading:
                await NEVER().wait()
            return name

        async def work(item: int) -> tuple[str, int]:
            reach()
            if stuck:
                await NEVER().wait()
            return name, item

        self.ready, self.work = Remote(ready), Remote(work)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(pool, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(pool, "actors_alive", lambda board: 1)


def called(monkeypatch: pytest.MonkeyPatch, *actors: Fake, lost: set[str] = frozenset(), calls: int = 4) -> list[tuple[str, int]]:  # type: ignore[assignment]
    monkeypatch.setattr(pool, "lost_actors", lambda board: lost)

    async def main() -> list[tuple[str, int]]:
        turns = Turns(actors, None)
        return await asyncio.wait_for(asyncio.gather(*(turns.call("work", item) for item in range(calls))), 20)

    return asyncio.run(main())


def test_calls_go_round_and_answers_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    found = called(monkeypatch, Fake("a"), Fake("b"))
    assert [item for _, item in found] == [0, 1, 2, 3]
    assert {name for name, _ in found} == {"a", "b"}


def test_an_actor_that_waits_for_a_node_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, Fake("a", loading=True), Fake("b")) == [("b", item) for item in range(4)]


def test_a_call_whose_node_is_gone_is_made_again_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, Fake("a", stuck=True), Fake("b"), lost={"a"}) == [("b", item) for item in range(4)]


def test_an_actor_that_is_out_of_reach_is_asked_again_once_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, Fake("a", unreached=3)) == [("a", item) for item in range(4)]


def test_a_call_that_ends_its_actor_each_time_fails_after_some_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    fatal = Fake("a")

    async def work(item: int) -> None:
        raise ray.exceptions.ActorUnavailableError(f"died of {item}", None)

    fatal.work = Remote(work)
    with pytest.raises(ray.exceptions.ActorUnavailableError, match="died of 7"):
        monkeypatch.setattr(pool, "lost_actors", lambda board: set())

        async def main() -> None:
            await asyncio.wait_for(Turns([fatal], None).call("work", 7), 20)

        asyncio.run(main())


def test_what_a_worker_finds_wrong_when_it_loads_reaches_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ray.exceptions.RayActorError):
        called(monkeypatch, Fake("a", broken=True))


def test_a_run_that_no_node_will_have_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "NO_ACTOR_SECONDS", 0.05)
    monkeypatch.setattr(pool, "actors_alive", lambda board: 0)
    with pytest.raises(InputError, match="no node for an actor"):
        called(monkeypatch, Fake("a", loading=True))
