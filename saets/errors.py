"""The one error that means "what you gave cannot be used"; the command line prints it as one line and exits with 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot work. The message says what was got, what was expected and what to do."""


def unknown(kind: str, got: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in a table, with the nearest known name.

    >>> unknown("method", "caaa", ["caa", "sae"]).args[0]
    "unknown method 'caaa'; known: caa, sae; did you mean 'caa'?"
    """
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {got!r}; known: {', '.join(names) or 'none'}{hint}")
