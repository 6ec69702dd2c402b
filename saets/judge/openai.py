"""A language model as judge, behind any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from openai import AsyncOpenAI

from saets.experiment.config import JudgeSettings
from saets.experiment.goal import Goal
from saets.judge.calls import CallLog
from saets.judge.chat import ChatServer, NoReply
from saets.judge.cost import Estimate, Spending, Tokens
from saets.judge.scores import HIGHEST, LOWEST, UnusableReply, parse_scores
from saets.judge.wording import Question, questions_for, score_format
from saets.records import Generation, Grade

ASKED = 2
"""How often a model is asked for usable scores."""


class OpenAIJudge:
    """Asks a chat model for integer scores from 1 to 10, a call a criterion or, by `judge.calls`, one for both.

    A reply without usable scores is asked for once more, with the reason. All replies are kept (`judge.cache`), usable or not, so
    the same texts are graded again without a call; with `retry_failed` unusable ones are asked anew.
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
        self.name = f"openai:{settings.model}"
        self._calls, self._retry_failed = settings.calls, retry_failed
        self._chat = ChatServer(settings, ceiling=ceiling, log=log, client=client)

    @property
    def spending(self) -> Spending:
        """Calls and cost so far."""
        return self._chat.spending

    async def check(self) -> None:
        """See `ChatServer.check`."""
        await self._chat.check(score_format(("score",)))

    async def close(self) -> None:
        """See `ChatServer.close`."""
        await self._chat.close()

    def note(self) -> str:
        """See `ChatServer.note`."""
        return self._chat.note()

    def estimate(self, texts: Iterable[tuple[Goal, Generation]]) -> Estimate:
        """What grading these texts takes, without those whose replies are kept; a question is counted once, as most are asked."""
        calls, tokens = 0, Tokens(0, 0)
        for goal, text in texts:
            for question in questions_for(goal, text, self._calls):
                if not self._is_settled(question):
                    calls += 1
                    tokens = tokens.plus(Tokens.expected(question.message, len(question.names)))
        prices = self.spending.prices
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

    async def ask(self, message: str, form: Mapping[str, Any], usable: Callable[[str], bool]) -> str:
        """The reply to any other message, kept or asked for now; see `ChatServer.ask`."""
        kept = self._chat.recall(message)
        if kept is not None and not (self._retry_failed and not usable(kept)):
            return kept
        return await self._chat.ask(message, form)

    async def _grades(self, text: Generation, question: Question) -> list[Grade]:
        asked, reply, reason = question, "", ""
        for _ in range(ASKED):
            try:
                reply = await self._reply(asked)
                scores = parse_scores(reply, asked.names)
                return [
                    Grade(text.generation_id, criterion, (scores[name] - LOWEST) / (HIGHEST - LOWEST), reply, None, self.name)
                    for criterion, name in zip(asked.criteria, asked.names, strict=True)
                ]
            except UnusableReply as error:
                asked, reason = question.again(str(error)), str(error)
            except NoReply as error:
                return self._failed(text, question, reply, str(error))
        return self._failed(text, question, reply, f"{reason}; asked {ASKED} times")

    def _failed(self, text: Generation, question: Question, reply: str, reason: str) -> list[Grade]:
        return [Grade(text.generation_id, criterion, None, reply, reason, self.name) for criterion in question.criteria]

    async def _reply(self, question: Question) -> str:
        kept = self._chat.recall(question.message)
        if kept is not None and not (self._retry_failed and _unusable(kept, question)):
            return kept
        return await self._chat.ask(question.message, score_format(question.names), len(question.names))

    def _is_settled(self, question: Question) -> bool:
        """Whether the replies that are kept say all there will be."""
        asked = question
        for _ in range(ASKED):
            kept = self._chat.recall(asked.message)
            if kept is None:
                return False
            try:
                parse_scores(kept, asked.names)
                return True
            except UnusableReply as error:
                asked = question.again(str(error))
        return not self._retry_failed


def _unusable(reply: str, question: Question) -> bool:
    try:
        parse_scores(reply, question.names)
    except UnusableReply:
        return True
    return False
