"""The client of a server that speaks OpenAI's API; the only place that reads the key."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from openai import DEFAULT_CONNECTION_LIMITS, AsyncOpenAI, DefaultAsyncHttpxClient, Timeout

from saets.errors import InputError
from saets.experiment.config import JudgeSettings

CONNECT_SECONDS = 10.0
"""A server that takes longer to accept a connection is taken for unreachable."""


def open_client(settings: JudgeSettings, *, asks: bool = True) -> AsyncOpenAI:
    """A client with the key of OPENAI_API_KEY. It retries nothing by itself and waits for ever for an answer: see `ChatServer`.

    One that `asks` nothing, for estimates, needs no key and takes none.

    Raises:
        InputError: no key or none that can be one, a base URL that is none or that holds a password.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip() if asks else "none"
    if not key:
        raise InputError(
            "the openai judge needs a key and OPENAI_API_KEY is not set: export it or put OPENAI_API_KEY=... into a .env file "
            'beside the experiment (any word will do for a server without keys); judge.kind = "local" needs none'
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("OPENAI_API_KEY holds a space or a character that no key has; copy it again")
    address = settings.base_url or os.environ.get("OPENAI_BASE_URL", "").strip()
    if address and not _is_web_address(address):
        raise InputError(f"judge.base_url is {address!r}; expected an address like http://localhost:8000/v1")
    if "@" in urlsplit(address).netloc:
        raise InputError(
            "judge.base_url holds a user name or password, which would stand in experiment.toml; leave it out and put the key "
            "into OPENAI_API_KEY"
        )
    limits = type(DEFAULT_CONNECTION_LIMITS)(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
    return AsyncOpenAI(
        api_key=key,
        base_url=address or None,
        timeout=Timeout(None, connect=min(CONNECT_SECONDS, settings.timeout)),
        max_retries=0,
        http_client=DefaultAsyncHttpxClient(limits=limits),
    )


def _is_web_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
