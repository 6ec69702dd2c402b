"""A small server that speaks OpenAI's chat completions and answers as it is told, for tests of the openai judge."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

KEY = "sk-not-a-real-key-0123456789"


class Answer(NamedTuple):
    """What the server sends back."""

    status: int
    body: str
    content_type: str = "application/json"


def says(text: str | None) -> Answer:
    return Answer(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}))


def fails(status: int, message: str = "as scheduled") -> Answer:
    return Answer(status, json.dumps({"error": {"message": message}}))


class Server(ThreadingHTTPServer):
    """Answers each request by `respond`, and keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond: Callable[[dict[str, Any]], Answer] = lambda request: says('{"score": 5}')
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def schedule(self, answers: dict[str, Sequence[Answer]]) -> None:
        """Answers in turn, by the first of these words that the message holds; the last answer repeats."""
        left = {word: list(turns) for word, turns in answers.items()}
        lock = threading.Lock()

        def respond(request: dict[str, Any]) -> Answer:
            message = request["messages"][0]["content"]
            with lock:
                turns = next(turns for word, turns in left.items() if word in message)
                return turns.pop(0) if len(turns) > 1 else turns[0]

        self.respond = respond


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        self.server.paths.append(self.path)
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.respond(request)
        body = answer.body.encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""
