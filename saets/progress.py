"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]
"""Called with the number of things just done."""


@runtime_checkable
class Progress(Protocol):
    """Something that shows the progress of a stage."""

    def stage(self, title: str, total: int, done: int, unit: str) -> AbstractContextManager[Advance]:
        """Show `total` things of kind `unit`, of which `done` were there before; yields the function that counts on."""
        ...


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str) -> Iterator[Advance]:
        yield lambda _: None
