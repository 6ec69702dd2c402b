"""What could not be judged: how much, why, and when it is too much to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from saets.errors import InputError

ENOUGH = 50
"""Texts or battles after which a share of failures says something."""

REASONS = 3
"""How many reasons are shown."""


class Failures:
    """Counts what was judged, and what of it failed; a text fails with any of its criteria."""

    def __init__(self, most: float, what: str, command: str) -> None:
        """`most` is the share that may fail; `what` was done with which `command` is for the reader."""
        self.most, self.judged, self.failed = most, 0, 0
        self.reasons: Counter[str] = Counter()
        self._what, self._command = what, command

    def add(self, judged: Iterable[tuple[str, str | None]]) -> None:
        """Count some, each with its id, which may come several times, and why it failed, or None.

        Raises:
            InputError: of at least `ENOUGH` more than `most` failed; names the most frequent reasons.
        """
        judged = list(judged)
        reasons = [reason for _, reason in judged if reason is not None]
        self.judged += len({key for key, _ in judged})
        self.failed += len({key for key, reason in judged if reason is not None})
        self.reasons.update(reasons)
        if self.judged >= ENOUGH and self.failed > self.most * self.judged:
            raise InputError(
                f"{self.failed} of {self.judged} {self._what}, more than judge.max_failed ({self.most:g}): "
                f"{'; '.join(most_frequent(self.reasons.elements()))}. Everything is kept; when the reason is gone, "
                f"`saets {self._command} --retry-failed` asks for the failed ones again"
            )


def most_frequent(reasons: Iterable[str]) -> list[str]:
    """The most frequent reasons, each with how often it occurred.

    >>> most_frequent(["no answer", "refused", "no answer"])
    ['no answer (2 times)', 'refused (once)']
    """
    return [f"{reason} ({'once' if count == 1 else f'{count} times'})" for reason, count in Counter(reasons).most_common(REASONS)]
