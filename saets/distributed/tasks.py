"""Work that needs no weights, as plain Ray tasks: bootstraps, swaps and strengths of each goal on any node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray

from saets.distributed.cluster import input_error

Result = TypeVar("Result")

RETRIES = 2
"""Of a task whose process died."""


def spread(work: Callable[..., Result], items: Sequence[tuple[Any, ...]]) -> list[Result]:
    """What `work(*item)` gives for each item, in order; computed here where Ray does not run, since starting it takes longer.

    A task reserves no CPU, as a command's actors hold theirs until it ends; no more run at once than the cluster has CPUs.

    Raises:
        InputError: what the work found wrong.
        ray.exceptions.RayError: a task failed for good.
    """
    if not ray.is_initialized():
        return [work(*item) for item in items]
    task = ray.remote(num_cpus=0, max_retries=RETRIES)(work)
    most = max(1, int(ray.cluster_resources().get("CPU", 1)))
    begun: list[Any] = []
    running: list[Any] = []
    try:
        for item in items:
            if len(running) == most:
                _, running = ray.wait(running)
            begun.append(task.remote(*item))
            running.append(begun[-1])
        return ray.get(begun)
    except ray.exceptions.RayError as error:
        raise input_error(error) or error from error
