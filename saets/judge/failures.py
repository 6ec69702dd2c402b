"""Texts that could not be graded: how many, why, and when there are too many to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from saets.errors import InputError
from saets.records import Grade

ENOUGH = 50
"""Texts after which a share of failures says something."""

REASONS = 3
"""How many reasons are shown."""


class Failures:
    """Counts graded texts and those of them that failed; a text fails with any of its criteria."""

    def __init__(self, most: float) -> None:
        """`most` is the share that may fail."""
        self.most, self.texts, self.failed = most, 0, 0
        self.reasons: Counter[str] = Counter()

    def add(self, grades: Sequence[Grade]) -> None:
        """Count the grades of some texts.

        Raises:
            InputError: of at least `ENOUGH` texts more than `most` failed; names the most frequent reasons.
        """
        self.texts += len({grade.generation_id for grade in grades})
        self.failed += len({grade.generation_id for grade in grades if grade.error is not None})
        self.reasons.update(grade.error for grade in grades if grade.error is not None)
        if self.texts >= ENOUGH and self.failed > self.most * self.texts:
            raise InputError(
                f"{self.failed} of {self.texts} texts could not be graded, more than judge.max_failed ({self.most:g}): "
                f"{'; '.join(most_frequent(self.reasons.elements()))}. Every grade is kept; when the reason is gone, "
                "`saets grade --retry-failed` asks for the failed ones again"
            )


def most_frequent(reasons: Iterable[str]) -> list[str]:
    """The most frequent reasons, each with how often it occurred.

    >>> most_frequent(["no answer", "refused", "no answer"])
    ['no answer (2 times)', 'refused (once)']
    """
    return [f"{reason} ({'once' if count == 1 else f'{count} times'})" for reason, count in Counter(reasons).most_common(REASONS)]
