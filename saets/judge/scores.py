"""Finding scores in what a judge replied, however it wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

LOWEST, HIGHEST = 1, 10
"""The scale a judge answers on."""

_OBJECT = re.compile(r"\{[^{}]*\}")
_OUT_OF_TEN = re.compile(r"(?<![\w.\-/])(\d{1,9})\s*(?:/|out of)\s*10(?!\d|\.\d)", re.IGNORECASE)
_INTEGER = re.compile(r"-?\d{1,9}")


class UnusableReply(ValueError):
    """A reply without a score from 1 to 10 for each name; the message says what is wrong with it."""


def parse_scores(reply: str, names: Sequence[str]) -> dict[str, int]:
    """The score of each name in a reply: `parse_score` for one name, else JSON or "name: 8", tried in this order.

    Raises:
        UnusableReply: a name without a score, with several that differ, or with one that is no integer in 1..10.
    """
    if len(names) == 1:
        return {names[0]: parse_score(reply, names[0])}
    plain = _plain(reply)
    try:
        return {name: _one(name, (_in_json(reply, name), _named(plain, name))) for name in names}
    except UnusableReply as error:
        raise UnusableReply(str(error)) from None


def parse_score(reply: str, name: str = "score") -> int:
    """The one score in a reply: JSON, JSON inside prose, "8/10", "score: 8" or a bare integer, tried in this order.

    Raises:
        UnusableReply: no score, several that differ, one that is no integer, or one outside 1..10.
    """
    plain = _plain(reply)
    bare = [plain.rstrip(".")] if _INTEGER.fullmatch(plain.rstrip(".")) else []
    return _one(name, (_in_json(reply, name), _OUT_OF_TEN.findall(plain), _named(plain, name), bare))


def _one(name: str, ways: Sequence[Iterator[int] | Sequence[str]]) -> int:
    """The score that the first way to read a reply finds, if it finds any."""
    for found in ways:
        scores = {int(score) for score in found}
        if len(scores) > 1:
            raise UnusableReply(f"the reply holds several scores: {', '.join(map(str, sorted(scores)))}")
        for score in scores:
            if not LOWEST <= score <= HIGHEST:
                raise UnusableReply(f"{name} {score} is outside {LOWEST}..{HIGHEST}")
            return score
    raise UnusableReply("the reply holds no score" if name == "score" else f"the reply holds no score for {name}")


def _plain(reply: str) -> str:
    return reply.replace("*", "").replace("`", "").strip()


def _named(plain: str, name: str) -> list[str]:
    pattern = rf"\b{re.escape(name)}\b[\"']?\s*(?:is|of|[:=])?\s*[\"']?(-?\d{{1,9}})(?!\d|[./]\d)"
    return re.findall(pattern, plain, re.IGNORECASE)


def _in_json(reply: str, name: str) -> Iterator[int]:
    """Scores of the JSON objects in the reply; whole numbers, also as a float or a string."""
    for text in _OBJECT.findall(reply):
        try:
            score = json.loads(text).get(name)
        except ValueError:
            continue
        if isinstance(score, str) and (_INTEGER.fullmatch(score.strip()) or _OUT_OF_TEN.fullmatch(score.strip())):
            score = int(score.split("/")[0].split()[0])
        if isinstance(score, float) and score.is_integer():
            score = int(score)
        if isinstance(score, int) and not isinstance(score, bool):
            yield score
