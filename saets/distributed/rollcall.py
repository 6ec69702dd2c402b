"""Which actors are alive: each says so every few seconds to a board on the driver's node."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BEAT_SECONDS = 5.0
"""Time between two signs of life of an actor."""

SILENT_SECONDS = 20.0
"""An actor that was not heard of for so long does not count as alive."""

Board = Any
"""Handle of a `_Board` actor."""


class _Board:
    def __init__(self) -> None:
        self._heard: dict[str, float] = {}

    def hear(self, actor: str) -> None:
        self._heard[actor] = time.monotonic()

    def alive(self) -> int:
        return sum(time.monotonic() - heard < SILENT_SECONDS for heard in self._heard.values())


def open_board() -> Board:
    """A new board on this node; gone when its handle is."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
    return ray.remote(**options)(_Board).remote()


def actors_alive(board: Board) -> int | None:
    """How many actors answer; None where the board itself does not, at once or at all."""
    try:
        return int(ray.get(board.alive.remote(), timeout=BEAT_SECONDS))
    except ray.exceptions.RayError:
        return None


def answering(board: Board | None) -> None:
    """From now on this actor tells the board that it is alive, also while it loads and computes."""
    if board is None:
        return
    me = ray.get_runtime_context().get_actor_id()

    def beat() -> None:
        while True:
            with contextlib.suppress(ray.exceptions.RayError):
                board.hear.remote(me)
            time.sleep(BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
