"""Calls without a reply: what went wrong, whether to try again, and what to tell the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from openai import APIConnectionError, APIError, APIResponseValidationError, APIStatusError

from saets.errors import InputError
from saets.judge.pace import retry_after

PATIENCE = 600.0
"""Seconds; a server that asks to wait longer ends the command, which may be run again later."""

TRANSIENT = (408, 409, 425, 429)
"""Status codes below 500 after which the same call may succeed."""

HOPELESS = (401, 404)
"""Status codes after which no other call will succeed either."""


Fate = Literal["refused", "foreign", "silent", "unsent"]
"""What became of a call: the server said no, said something that is no chat completion, said nothing, or was not reached."""


class Fault(Exception):
    """One call without a reply."""

    def __init__(
        self,
        reason: str,
        fate: Fate,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason, self.fate, self.status = reason, fate, status
        self.wait = retry_after(headers or {})
        self.quota = code == "insufficient_quota"

    @property
    def again(self) -> bool:
        """Whether the same call may succeed later."""
        return not self.quota and (self.status is None or self.status in TRANSIENT or self.status >= 500)

    @property
    def hopeless(self) -> bool:
        """Whether grading cannot go on."""
        return self.quota or self.status in HOPELESS or (self.again and (self.wait or 0.0) > PATIENCE)

    @property
    def shared(self) -> bool:
        """Whether every caller is asked to wait."""
        return self.status == 429 or (self.again and self.wait is not None)


def fault_of(error: APIError | ValueError, hidden: Callable[[str], str]) -> Fault:
    """What an error of the client means; `hidden` takes secrets out of what a server said."""
    if isinstance(error, APIConnectionError):
        cause = error.__cause__
        said = f"{error.message} ({cause})" if cause and str(cause) else error.message
        reached = not type(cause).__name__.startswith("Connect")  # ConnectError, ConnectTimeout
        return Fault(_line(error, said, hidden), "silent" if reached else "unsent")
    if isinstance(error, APIStatusError):
        said = _line(error, error.message, hidden)
        return Fault(said, "refused", error.status_code, error.response.headers, error.code)
    if isinstance(error, APIError) and not isinstance(error, APIResponseValidationError):
        return Fault(_line(error, error.message, hidden), "refused", 400)
    return Fault("the answer is not JSON", "foreign")


def refusal(fault: Fault, where: str, model: str) -> InputError:
    """What is wrong with the server, and what to do."""
    if fault.status in (401, 403):
        return InputError(f"{where} refused OPENAI_API_KEY: {fault.reason}")
    if fault.status == 404:
        return InputError(
            f"{where} has no model {model!r} or no chat completions at this address; set judge.model and judge.base_url "
            f"(it usually ends in /v1): {fault.reason}"
        )
    if fault.fate == "foreign":
        return InputError(f"{where} does not speak OpenAI's chat completions: {fault.reason}")
    if fault.status is None:
        return InputError(f'{where} cannot be reached: {fault.reason}; start it, set judge.base_url, or use judge.kind = "local"')
    later = f"; it asks to wait {fault.wait:.0f} s: run the same command again then" if fault.wait else ""
    return InputError(f"{where} does not answer for {model!r}: {fault.reason}{later}")


def _line(error: APIError, said: str, hidden: Callable[[str], str]) -> str:
    return hidden(" ".join(f"{type(error).__name__}: {said}".split()))[:300]
