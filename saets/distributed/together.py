"""What the workers of a Ray Train job do together; alone in the driver's process there is nothing to wait for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from saets.errors import InputError


def workers() -> int:
    """How many they are; 1 in the driver's process."""
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if grouped else 1


def sum_over_workers(tensors: Sequence[torch.Tensor]) -> None:
    """Add up over workers, in place."""
    if workers() > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def of_all_workers(items: list[Any]) -> list[Any]:
    """The items of every worker, in order of ranks."""
    if workers() == 1:
        return items
    gathered: list[list[Any]] = [[] for _ in range(workers())]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """Where one worker raises an `InputError` inside, all raise it at the end; else the others would wait for it for ever.

    There must be no collective operation inside.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as raised:
        error = raised
    messages = of_all_workers([str(error)] if error else [])
    if messages:
        raise error or InputError(messages[0])
