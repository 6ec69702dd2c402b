"""Judges grade completions: how well they show a goal's behaviour, and how coherent they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saets.experiment.goal import Goal
from saets.records import Generation, Grade


@runtime_checkable
class Judge(Protocol):
    """Anything that grades; the name goes into every grade."""

    name: str

    async def grade(self, goal: Goal, texts: Sequence[Generation]) -> list[Grade]:
        """Two grades a text, behaviour then coherence, in the order of the texts; a failure is a grade without a score."""
        ...


def clean_text(text: str) -> str:
    """The text as valid UTF-8 without NUL: lone surrogates become "?", NUL the replacement character.

    >>> clean_text("ab" + chr(0xD800) + "c")
    'ab?c'
    """
    return text.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")
