"""Who is alive: actors that answer, until they have been silent for too long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from saets.distributed import rollcall
from saets.distributed.cluster import Cluster
from saets.distributed.nodes import Packages
from saets.experiment.loading import load_experiment


def test_an_actor_counts_until_it_has_been_silent_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now)
    board = rollcall._Board(Packages.here())
    board.hear("one", "here")
    board.hear("two", "there")
    now += rollcall.SILENT_SECONDS - 1
    assert board.alive() == 2
    board.hear("two", "there")
    now += 2
    assert board.alive() == 1
    board.hear("one", "here")
    assert board.alive() == 2


def test_an_actor_is_lost_once_it_is_silent_and_its_node_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(rollcall.time, "monotonic", lambda: now)
    monkeypatch.setattr(rollcall.ray, "nodes", lambda: [{"NodeID": "here", "Alive": True}, {"NodeID": "there", "Alive": False}])
    board = rollcall._Board(Packages.here())
    board.hear("one", "here")
    board.hear("two", "there")
    assert board.lost() == set()
    now += rollcall.SILENT_SECONDS
    assert board.lost() == {"two"}
    board.hear("two", "here")
    assert board.lost() == set()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(load_experiment("tiny").execution) as cluster:
        cluster.connect()
        yield cluster


@pytest.mark.ray
def test_real_actors_are_counted_and_a_lost_board_is_no_error(cluster: Cluster) -> None:
    class Answering:
        def __init__(self, board: rollcall.Board) -> None:
            rollcall.answering(board)

        def ready(self) -> bool:
            return True

    board = rollcall.open_board()
    actors = [ray.remote(Answering).remote(board) for _ in range(2)]
    assert all(ray.get([actor.ready.remote() for actor in actors]))
    assert rollcall.actors_alive(board) == 2, "an actor that is ready was heard of, or its death would not be noticed"
    ray.kill(board)
    deadline = time.monotonic() + 60
    while rollcall.actors_alive(board) is not None:  # the kill is on its way
        assert time.monotonic() < deadline
