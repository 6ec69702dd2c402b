"""Asking a server that speaks OpenAI's chat completions: one message, one reply, at temperature 0."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

from openai import APIError, AsyncOpenAI

from saets.errors import InputError
from saets.experiment.config import JudgeSettings
from saets.judge import clean_text
from saets.judge.cache import Reply, ReplyCache, cache_folder, question_key
from saets.judge.calls import CallLog
from saets.judge.client import open_client
from saets.judge.cost import Spending, Tokens, prices_of
from saets.judge.faults import Fault, fault_of, refusal
from saets.judge.pace import Pace, backoff

REPLY_TOKENS = 256
"""Most tokens of a reply: room for a sentence around a score."""

DRAIN_SECONDS = 5.0
"""How long calls in flight may still be answered when grading ends early."""


class NoReply(Exception):
    """The server gave no reply to this message, for good; says why, without the key."""


class ChatServer:
    """A model behind a server. One event loop each.

    Calls that fail for a passing reason (429, 5xx, no answer in time, connection lost, an answer that is no chat completion) are
    tried again, `judge.max_retries` times at most; a 429 slows all of them. A reply is on disk before it is used.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        *,
        ceiling: float | None = None,
        log: CallLog | None = None,
        client: AsyncOpenAI | None = None,
    ) -> None:
        """Sends and writes nothing yet. Without a client, the key is read from OPENAI_API_KEY.

        Raises:
            InputError: no usable key, a base URL that is none, a cache that cannot be written, a ceiling without prices.
        """
        self._model, self._timeout, self._retries = settings.model, settings.timeout, settings.max_retries
        self._client = client or open_client(settings)
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        folder = cache_folder(settings)
        self._cache = ReplyCache(folder) if folder else None
        self._log = log or CallLog()
        self.spending = Spending(prices_of(settings, str(self._client.base_url)), ceiling)
        self._takes_format = True
        self._asked: dict[str, asyncio.Task[str]] = {}
        self._flying: set[asyncio.Task[str]] = set()

    def recall(self, message: str) -> str | None:
        """The reply that is kept of this message, or None.

        Which options went with it does not matter: whether the server takes a format follows from address and model.
        """
        found = self._cache.read(self._key(message)) if self._cache else None
        return found.text if found else None

    async def ask(self, message: str, form: Mapping[str, Any], scores: int = 1) -> str:
        """The reply to a message, asked for now and kept; whoever asks the same meanwhile gets the same reply.

        `form` holds options for an answer of a certain form, for servers that know them; `scores` is how many it will hold.

        Raises:
            NoReply: none came in all attempts, or the server refuses this message.
            InputError: grading cannot go on: key or model are refused, the quota is used up, a ceiling is reached, the server
                asks to wait for very long, a reply cannot be kept.
        """
        task = self._asked.get(message)
        if task is None:
            task = self._asked[message] = asyncio.create_task(self._persist(_Asked(message, form, scores), self._retries))
            task.add_done_callback(lambda _: self._asked.pop(message))
        try:
            return await _awaited(task)
        except Fault as fault:
            if fault.hopeless:
                raise self._refusal(fault) from fault
            raise NoReply(fault.reason) from fault

    async def check(self, form: Mapping[str, Any]) -> None:
        """Makes one call with these options, not kept, and returns when the server answered it.

        Raises:
            InputError: wrong key, no such model, server that cannot be reached or that does not speak this API.
        """
        asked = _Asked('Answer with the JSON {"score": 10}.', form, 1, kept=False)
        try:
            await self._persist(asked, min(1, self._retries))
        except Fault as fault:
            raise self._refusal(fault) from fault

    async def close(self) -> None:
        """Sends nothing more, gives calls in flight a few seconds to be answered and kept, and closes the connections."""
        for asking in list(self._asked.values()):
            asking.cancel()
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        if self._flying:
            _, late = await asyncio.wait(self._flying, timeout=DRAIN_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._client.close()

    def note(self) -> str:
        """Calls, cost and whether everyone waits, in a few words."""
        pause = self._pace.pause()
        return self.spending.line() + (f", waiting {pause:.0f} s for the server" if pause >= 1 else "")

    async def _persist(self, asked: _Asked, retries: int) -> str:
        """The reply, in as many attempts as it takes and may take."""
        failed = 0
        while True:
            try:
                async with self._slots:
                    return await self._in_either_form(asked, failed)
            except Fault as fault:
                failed += 1
                if not fault.again or fault.hopeless or failed > retries:
                    raise
                if not fault.shared:
                    await asyncio.sleep(backoff(failed, random.random()))

    async def _in_either_form(self, asked: _Asked, failed: int) -> str:
        """The reply with the form asked for, or without it where the server refuses that."""
        if not asked.form or not self._takes_format:
            return await self._attempt(asked, {}, failed)
        try:
            return await self._attempt(asked, asked.form, failed)
        except Fault as fault:
            if fault.status not in (400, 422):
                raise
        # The text may be what was refused (it can be too long): only an answer without the form settles that.
        reply = await self._attempt(asked, {}, failed)
        self._takes_format = False
        return reply

    async def _attempt(self, asked: _Asked, form: Mapping[str, Any], failed: int) -> str:
        """One call, when it is its turn."""
        turn = await self._pace.turn(sum(Tokens.expected(asked.message, asked.scores)))
        held = await self.spending.hold(Tokens.most(asked.message, REPLY_TOKENS))
        # The call is a task of its own: whoever asked may be cancelled, and a reply that arrives is kept nevertheless.
        task = asyncio.create_task(self._send(asked, form, held))
        self._flying.add(task)
        task.add_done_callback(self._flying.discard)
        try:
            reply = await _awaited(task)
        except Fault as fault:
            if fault.shared:
                self._pace.refused(turn, backoff(failed + 1, random.random()) if fault.wait is None else fault.wait)
            raise
        self._pace.answered()
        return reply

    async def _send(self, asked: _Asked, form: Mapping[str, Any], held: float) -> str:
        """One call from its entry in the log to its reply on disk."""
        self._log.sent()
        cost: Tokens | None = None
        try:
            reply = await self._call(asked, form)
            cost = Tokens(reply.tokens_in or 0, reply.tokens_out or 0)
            if reply.tokens_in is None or reply.tokens_out is None:
                cost = Tokens.expected(asked.message, asked.scores)
            if self._cache and asked.kept:
                self._cache.write(self._key(asked.message), reply, {"model": self._model, "format": bool(form)})
            self._log.answered(cost)
            return reply.text
        except Fault as fault:
            if fault.fate == "silent":
                self._log.lost()
            elif fault.fate == "unsent":
                self._log.unsent()
            else:
                self._log.answered(Tokens(0, 0))
            if fault.fate in ("refused", "unsent"):
                cost = Tokens(0, 0)
            raise
        except asyncio.CancelledError:
            self._log.lost()
            raise
        finally:
            self.spending.settle(held, cost)

    async def _call(self, asked: _Asked, options: Mapping[str, Any]) -> Reply:
        try:
            async with asyncio.timeout(self._timeout):
                completion = await self._client.chat.completions.create(
                    model=self._model,
                    messages=[{"role": "user", "content": asked.message}],
                    temperature=0,
                    max_tokens=REPLY_TOKENS,
                    **options,
                )
        except TimeoutError as error:
            raise Fault(f"no answer in {self._timeout:g} s", "silent") from error
        except (APIError, ValueError) as error:
            raise fault_of(error, self._hidden) from None  # the error may repeat the key
        # A server that is no such API can answer 200 with anything, which the client hands over as it came.
        choices = getattr(completion, "choices", None) or [None]
        answer = getattr(choices[0], "message", None)
        if answer is None or not hasattr(answer, "content"):
            raise Fault("the answer holds no message", "foreign")
        used = getattr(completion, "usage", None)
        text = self._hidden(answer.content) if isinstance(answer.content, str) else ""
        return Reply(text, _count(used, "prompt_tokens"), _count(used, "completion_tokens"))

    def _key(self, message: str) -> str:
        asked = {"model": self._model, "address": str(self._client.base_url), "message": message}
        return question_key({**asked, "temperature": 0, "max_tokens": REPLY_TOKENS})

    def _refusal(self, fault: Fault) -> InputError:
        return refusal(fault, f"the judge's server {self._client.base_url} (judge.base_url)", self._model)

    def _hidden(self, text: str) -> str:
        """Valid text without the key, even where a server repeats it."""
        text = clean_text(text)
        return text.replace(self._client.api_key, "[key]") if self._client.api_key else text


class _Asked(NamedTuple):
    message: str
    form: Mapping[str, Any]
    scores: int
    kept: bool = True


async def _awaited(task: asyncio.Task[str]) -> str:
    """What the task gives; it goes on when whoever waits for it is cancelled, and nobody logs how it ends."""
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


def _count(usage: Any, name: str) -> int | None:
    number = getattr(usage, name, None)
    return number if isinstance(number, int) and number >= 0 else None
