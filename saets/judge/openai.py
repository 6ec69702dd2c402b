"""A language model as judge, behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from openai import AsyncOpenAI

from saets.experiment.config import JudgeSettings
from saets.experiment.goal import Goal
from saets.files.storage import shareable
from saets.judge.calls import CallLog
from saets.judge.chat import ChatServer, NoReply
from saets.judge.cost import Estimate, Tokens
from saets.judge.scores import HIGHEST, LOWEST, UnusableReply
from saets.judge.wording import Question, questions_for, score_format
from saets.records import Generation, Grade

ASKED = 2
"""How often a model is asked for a usable reply."""

Read = TypeVar("Read", covariant=True)


@runtime_checkable
class Askable(Protocol[Read]):
    """Something to ask a model."""

    @property
    def message(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]:
        """What the answer holds, by name."""
        ...

    @property
    def form(self) -> Mapping[str, Any]:
        """Options for an answer of a certain form, for servers that know them."""
        ...

    def read(self, reply: str) -> Read:
        """What a reply says. Raises `UnusableReply`."""
        ...

    def again(self, reason: str) -> Askable[Read]:
        """The same, with a word on why the last reply could not be used."""
        ...


class Answer(NamedTuple, Generic[Read]):
    """What came of asking."""

    found: Read | None
    """None where nothing usable was said."""
    reply: str
    error: str | None


class OpenAIJudge:
    """Asks a chat model for integer scores from 1 to 10, a call a criterion or, by `judge.calls`, one for both.

    An unusable reply is asked for once more, with the reason. All replies are kept (`judge.cache`), usable or not, so the same is
    asked again without a call; with `retry_failed` unusable ones are asked anew.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        *,
        ceiling: float | None = None,
        retry_failed: bool = False,
        log: CallLog | None = None,
        client: AsyncOpenAI | None = None,
    ) -> None:
        """Sends nothing yet; `ceiling` is in US dollars. See `ChatServer` for what it raises."""
        self.name = f"openai:{shareable(settings.model)}"
        self.server = ChatServer(settings, ceiling=ceiling, log=log, client=client)
        self._calls, self._retry_failed = settings.calls, retry_failed

    async def check(self) -> None:
        """One call for a score. Raises `InputError`: see `ChatServer.check`."""
        await self.server.check(score_format(("score",)))

    def estimate(self, texts: Iterable[tuple[Goal, Generation]]) -> Estimate:
        """What grading these texts takes; see `estimate_of`."""
        return self.estimate_of(question for goal, text in texts for question in questions_for(goal, text, self._calls))

    def estimate_of(self, questions: Iterable[Askable[object]]) -> Estimate:
        """What asking takes, without what is settled by replies that are kept; each counts once, as most are asked."""
        calls, tokens = 0, Tokens(0, 0)
        for question in questions:
            if not self._is_settled(question):
                calls += 1
                tokens = tokens.plus(Tokens.expected(question.message, len(question.names)))
        prices = self.server.spending.prices
        return Estimate(calls, tokens, prices.of(tokens) if prices else None)

    async def grade(self, goal: Goal, texts: Sequence[Generation]) -> list[Grade]:
        """Two grades a text, behaviour then coherence, in the order of the texts; a failure is a grade without a score.

        Raises:
            InputError: grading cannot go on; see `ChatServer.ask`.
        """
        asked = [(text, question) for text in texts for question in questions_for(goal, text, self._calls)]
        answers = [asyncio.ensure_future(self._grades(text, question)) for text, question in asked]
        try:
            return [grade for grades in await asyncio.gather(*answers) for grade in grades]
        finally:
            for answer in answers:
                answer.cancel()

    async def answer(self, question: Askable[Read]) -> Answer[Read]:
        """What the model says, from what is kept or asked for now, twice at most.

        Raises:
            InputError: asking cannot go on; see `ChatServer.ask`.
        """
        asked, reply, reason = question, "", ""
        for _ in range(ASKED):
            try:
                reply = await self._reply(asked)
                return Answer(asked.read(reply), reply, None)
            except UnusableReply as error:
                asked, reason = question.again(str(error)), str(error)
            except NoReply as error:
                return Answer(None, reply, str(error))
        return Answer(None, reply, f"{reason}; asked {ASKED} times")

    async def _grades(self, text: Generation, question: Question) -> list[Grade]:
        scores, reply, error = await self.answer(question)
        return [
            Grade(text.generation_id, criterion, _share(scores[name]) if scores else None, reply, error, self.name)
            for criterion, name in zip(question.criteria, question.names, strict=True)
        ]

    async def _reply(self, question: Askable[object]) -> str:
        kept = self.server.recall(question.message)
        if kept is not None and not (self._retry_failed and _unusable(kept, question)):
            return kept
        return await self.server.ask(question.message, question.form, len(question.names))

    def _is_settled(self, question: Askable[object]) -> bool:
        """Whether the replies that are kept say all there will be."""
        asked = question
        for _ in range(ASKED):
            kept = self.server.recall(asked.message)
            if kept is None:
                return False
            reason = _unusable(kept, asked)
            if reason is None:
                return True
            asked = question.again(reason)
        return not self._retry_failed


def _share(score: int) -> float:
    """From 1..10 to 0..1."""
    return (score - LOWEST) / (HIGHEST - LOWEST)


def _unusable(reply: str, question: Askable[object]) -> str | None:
    """Why a reply says nothing; None where it does."""
    try:
        question.read(reply)
    except UnusableReply as error:
        return str(error)
    return None
