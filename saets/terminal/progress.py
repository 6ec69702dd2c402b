"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

Advance = Callable[[int], None]
"""Called with the number of things just done."""

Note = Callable[[], str]
"""Says in a few words what else there is to know, e.g. how many workers are alive."""


@runtime_checkable
class Progress(Protocol):
    """Something that shows the progress of a stage."""

    def stage(self, title: str, total: int, done: int, unit: str, note: Note | None = None) -> AbstractContextManager[Advance]:
        """Show `total` things of kind `unit`, of which `done` were there before; yields the function that counts on.

        `note` is asked now and then, from another thread, for what else is to be shown.
        """
        ...


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, title: str, total: int, done: int, unit: str, note: Note | None = None) -> Iterator[Advance]:
        yield lambda _: None
