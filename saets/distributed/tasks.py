"""Work that needs no model, as plain Ray tasks: steering vectors, bootstraps, swaps and strengths, on any node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from saets.distributed.cluster import cores, input_error

Result = TypeVar("Result")

RETRIES = 2
"""Of a task whose process died."""


def put(value: Any) -> Any:
    """A reference through which the items of `spread` share a value that is sent once a node; without Ray the value itself."""
    return ray.put(value) if ray.is_initialized() else value


def spread(
    work: Callable[..., Result], items: Sequence[tuple[Any, ...]], advance: Callable[[int], object] = lambda done: None
) -> list[Result]:
    """What `work(*item)` gives for each item, in order; computed here where Ray does not run, since starting it takes longer.

    `advance` is told how many more are done. A task reserves no CPU, as a command's actors hold theirs until it ends; no more run
    at once than there are cores.

    Raises:
        InputError: what the work found wrong.
        ray.exceptions.RayError: a task failed for good.
    """
    if not ray.is_initialized():
        return [_here(work, item, advance) for item in items]
    task = ray.remote(num_cpus=0, max_retries=RETRIES)(work)
    most = cores()
    begun: list[Any] = []
    running: list[Any] = []
    try:
        for item in items:
            if len(running) == most:
                running = _fewer(running, advance)
            begun.append(task.remote(*item))
            running.append(begun[-1])
        while running:
            running = _fewer(running, advance)
        return ray.get(begun)
    except ray.exceptions.RayError as error:
        raise input_error(error) or error from error


def _fewer(running: list[Any], advance: Callable[[int], object]) -> list[Any]:
    done, left = ray.wait(running)
    advance(len(done))
    return left


def _here(work: Callable[..., Result], item: tuple[Any, ...], advance: Callable[[int], object]) -> Result:
    result = work(*item)
    advance(1)
    return result
