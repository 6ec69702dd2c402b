"""Work without a model: the same in tasks of other processes as in this one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from saets.distributed.cluster import Cluster
from saets.distributed.tasks import put, spread
from saets.errors import InputError
from saets.experiment.loading import load_experiment
from saets.scores.summary import Summary, summarise
from tests.scores.test_summary import MEANS, texts


def whose(number: int) -> tuple[int, int]:
    return number, os.getpid()


def chosen(values: list[int], place: int) -> int:
    return values[place]


def refuse(number: int) -> None:
    raise InputError(f"number {number} is not wanted")


def assert_same(one: Summary, other: Summary) -> None:
    assert all(left.equals(right) for left, right in zip(one, other, strict=True))


def test_without_ray_the_work_is_done_here() -> None:
    assert not ray.is_initialized()
    done: list[int] = []
    assert spread(whose, [(i,) for i in range(3)], done.append) == [(i, os.getpid()) for i in range(3)]
    assert done == [1, 1, 1]
    assert put(values := [1, 2]) is values
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(load_experiment("tiny").execution) as cluster:
        cluster.connect()
        yield cluster


@pytest.mark.ray
def test_with_ray_other_processes_do_it_in_order_and_more_items_than_processes_are_no_matter(cluster: Cluster) -> None:
    done: list[int] = []
    found = spread(whose, [(i,) for i in range(20)], done.append)
    assert sum(done) == 20
    assert [number for number, _ in found] == list(range(20))
    processes = {process for _, process in found}
    assert os.getpid() not in processes
    assert len(processes) <= (os.cpu_count() or 1), "each takes seconds to start"


@pytest.mark.ray
def test_a_value_that_is_put_once_reaches_every_item(cluster: Cluster) -> None:
    values = put([5, 6])
    assert isinstance(values, ray.ObjectRef)
    assert spread(chosen, [(values, i % 2) for i in range(4)]) == [5, 6, 5, 6]


@pytest.mark.ray
def test_what_the_work_finds_wrong_is_raised(cluster: Cluster) -> None:
    with pytest.raises(InputError, match="^number 7 is not wanted$"):
        spread(refuse, [(7,)])


@pytest.mark.ray
def test_tables_are_the_same_wherever_they_are_computed(cluster: Cluster) -> None:
    frame = texts(MEANS)
    assert_same(summarise(frame, seed=3, spread=spread), summarise(frame, seed=3))
