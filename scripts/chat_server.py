"""A small server that speaks OpenAI's chat completions and answers as it is told, well or badly.

    python scripts/chat_server.py [--port 8000] [--latency 0.2] [--misbehave]

It gives every message the same score each time, so a judge can be tried without a key and without a model. With `--misbehave`
each message meets one fault first: 429 with and without Retry-After, 500, silence, a reset connection, cut JSON, prose around
JSON, "8/10", 11, 0 or null. The first line printed is the address for `judge.base_url`. Tests and `benchmark_grading.py` use it
too.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, NamedTuple

KEY = "sk-not-a-real-key-0123456789"

REMINDER = "\n\nYour last answer"
"""Where a message that is asked again differs from the first one."""


class Answer(NamedTuple):
    """What the server sends back."""

    status: int
    body: str
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}
    broken: Literal["", "silent", "reset", "cut"] = ""
    """Nothing is sent until the server stops; the connection is reset; the body ends in its middle."""


def says(text: str | None, usage: Mapping[str, int] | None = None) -> Answer:
    """A chat completion."""
    body: dict[str, Any] = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return Answer(200, json.dumps(body | ({"usage": usage} if usage else {})))


def fails(status: int, message: str = "as scheduled", *, code: str | None = None, **headers: str) -> Answer:
    """An error as OpenAI words it; `retry_after="2"` becomes a header."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, json.dumps({"error": {"message": message, "code": code}}), headers=named)


def steady_scores(request: Mapping[str, Any]) -> dict[str, int]:
    """Scores from 1 to 10 that depend on the message alone, a reminder left out; under the names that the message asks for."""
    message = message_of(request).partition(REMINDER)[0]
    names = ("behaviour", "coherence") if '"behaviour": <integer>' in message else ("score",)
    return {name: 1 + zlib.crc32(f"{name}:{message}".encode()) % 10 for name in names}


def steady(request: Mapping[str, Any]) -> Answer:
    """A well-behaved answer."""
    return says(json.dumps(steady_scores(request)), {"prompt_tokens": len(message_of(request)) // 4, "completion_tokens": 6})


FAULTS: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
    "429 with a time": lambda request: fails(429, "slow down", retry_after="0"),
    "429 with a date": lambda request: fails(429, "slow down", retry_after="Thu, 01 Jan 1970 00:00:00 GMT"),
    "429": lambda request: fails(429, "slow down"),
    "500": lambda request: fails(500, "out of order"),
    "silent": lambda request: Answer(200, "", broken="silent"),
    "reset": lambda request: Answer(200, "", broken="reset"),
    "cut body": lambda request: steady(request)._replace(broken="cut"),
    "cut JSON": lambda request: says('{"sco'),
    "prose": lambda request: says(f"Here is my grade: {json.dumps(steady_scores(request))} I hope that helps."),
    "out of ten": lambda request: says(", ".join(f"{name}: {score}" for name, score in steady_scores(request).items())),
    "eleven": lambda request: says(json.dumps(dict.fromkeys(steady_scores(request), 11))),
    "zero": lambda request: says(json.dumps(dict.fromkeys(steady_scores(request), 0))),
    "null": lambda request: says(None),
}


class Misbehaving:
    """Answers steadily, but the first time that a text is to be graded with one of the faults, chosen by the message."""

    def __init__(self) -> None:
        self.met: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, request: Mapping[str, Any]) -> Answer:
        message = message_of(request).partition(REMINDER)[0]
        with self._lock:
            if message in self._seen or "<completion>" not in message:
                return steady(request)
            self._seen.add(message)
            fault = list(FAULTS)[zlib.crc32(message.encode()) // 10 % len(FAULTS)]
            self.met[fault] += 1
        if fault == "out of ten" and len(scores := steady_scores(request)) == 1:
            return says(f"{scores['score']}/10")
        return FAULTS[fault](request)


def message_of(request: Mapping[str, Any]) -> str:
    """What the user says in a request."""
    message: str = request["messages"][0]["content"]
    return message


class Server(ThreadingHTTPServer):
    """Answers each request by `respond`, `latency` seconds after it arrived, and keeps what was asked."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int = 0, latency: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.respond: Callable[[dict[str, Any]], Answer] = lambda request: says('{"score": 5}')
        self.latency = latency
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def messages(self) -> list[str]:
        """What was asked, in order."""
        return [message_of(request) for request in self.requests]

    def shutdown(self) -> None:
        """Stop, also where requests are being met with silence."""
        self.over.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def schedule(self, answers: dict[str, Sequence[Answer]]) -> None:
        """Answers in turn, by the first of these words that the message holds; the last answer repeats."""
        left = {word: list(turns) for word, turns in answers.items()}
        lock = threading.Lock()

        def respond(request: dict[str, Any]) -> Answer:
            message = message_of(request)
            with lock:
                turns = next(turns for word, turns in left.items() if word in message)
                return turns.pop(0) if len(turns) > 1 else turns[0]

        self.respond = respond


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.requests.append(request)
        server.paths.append(self.path)
        server.keys.append(self.headers["Authorization"])
        if server.latency:
            server.over.wait(server.latency)
        answer = server.respond(request)
        if answer.broken in ("silent", "reset"):
            self._break(answer)
            return
        body = answer.body.encode()
        headers = {"Content-Type": answer.content_type, "Content-Length": str(len(body)), **answer.headers}
        self.close_connection = answer.broken == "cut"
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        sent = body[: len(body) // 2] if answer.broken == "cut" else body
        self.wfile.write(f"HTTP/1.1 {answer.status} Scheduled\r\n{head}\r\n".encode() + sent)

    def _break(self, answer: Answer) -> None:
        if answer.broken == "silent":
            self.server.over.wait()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="by default any that is free")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds from a request to its answer")
    parser.add_argument("--misbehave", action="store_true", help="meet each message with a fault first")
    options = parser.parse_args()
    with Server(options.port, options.latency) as server:
        server.respond = Misbehaving() if options.misbehave else steady
        print(server.url, flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
