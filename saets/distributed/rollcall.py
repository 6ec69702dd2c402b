"""Which actors are alive: each says so every few seconds to a board on the driver's node. Which are lost with their node.

An actor also says which packages it runs, so that a node that came after the others were looked at does no work with others.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saets.distributed.nodes import Packages, check_packages

BEAT_SECONDS = 5.0
"""Time between two signs of life of an actor."""

SILENT_SECONDS = 20.0
"""An actor that was not heard of for so long does not count as alive. If its node is gone too it is lost: it waits for another
node, which may never come."""

Board = Any
"""Handle of a `_Board` actor."""


class _Board:
    def __init__(self, packages: Packages) -> None:
        self._packages = packages
        self._heard: dict[str, tuple[float, str]] = {}

    def join(self, actor: str, node: str, packages: Packages) -> list[str]:
        self.hear(actor, node)
        return self._packages.unlike(packages)

    def hear(self, actor: str, node: str) -> None:
        self._heard[actor] = time.monotonic(), node

    def alive(self) -> int:
        return sum(time.monotonic() - heard < SILENT_SECONDS for heard, _ in self._heard.values())

    def all(self) -> set[str]:
        return set(self._heard)

    def lost(self, seconds: float = SILENT_SECONDS) -> set[str]:
        silent = {actor for actor, (heard, _) in self._heard.items() if time.monotonic() - heard >= seconds}
        if not silent:
            return silent
        there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return {actor for actor in silent if self._heard[actor][1] not in there}


def open_board() -> Board:
    """A new board on this node, which it must not outlive: elsewhere it would forget the actors of the node that it dies with.

    It is gone when its handle is. (`soft=True` puts an actor without resources on other nodes too.)
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(**options)(_Board).remote(Packages.here())


def actors_alive(board: Board) -> int | None:
    """How many actors answer; None where the board itself does not, at once or at all."""
    try:
        return int(ray.get(board.alive.remote(), timeout=BEAT_SECONDS))
    except ray.exceptions.RayError:
        return None


def all_actors(board: Board) -> set[str]:
    """Ids of all actors that were ever heard of; none where the board does not answer."""
    return _asked(board.all.remote())


def lost_actors(board: Board, seconds: float = SILENT_SECONDS) -> set[str]:
    """Ids of the actors that were silent for so long, whose node is gone, and that run nowhere else yet; none where the board
    does not answer."""
    return _asked(board.lost.remote(seconds))


def _asked(answer: Any) -> set[str]:
    try:
        found: set[str] = ray.get(answer, timeout=BEAT_SECONDS)
    except ray.exceptions.RayError:
        return set()
    return found


def give_up(actor: str) -> None:
    """End an actor of this driver for good, so that what it was to do fails instead of waiting for it."""
    from ray._private.worker import global_worker  # Ray ends an actor by its handle alone, and a Dataset shows none

    worker: Any = global_worker
    with contextlib.suppress(ray.exceptions.RayError):
        worker.core_worker.kill_actor(ray.ActorID.from_hex(actor), True)


def answering(board: Board | None) -> None:
    """From now on this actor tells the board that it is alive, also while it loads and computes.

    It waits until the board has heard of it once: an actor that the board never heard of could not be missed.

    Raises:
        InputError: other versions of packages here than where the board was opened.
    """
    if board is None:
        return
    context = ray.get_runtime_context()
    me, node = context.get_actor_id(), context.get_node_id()
    different: list[str] = []
    with contextlib.suppress(ray.exceptions.RayError):
        different = ray.get(board.join.remote(me, node, Packages.here()))
    check_packages(different)

    def beat() -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):
                board.hear.remote(me, node)

    threading.Thread(target=beat, daemon=True).start()
