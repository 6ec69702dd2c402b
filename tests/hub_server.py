"""A small Hugging Face hub on this machine: resolve, preupload, LFS and commit, as the real one speaks them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
SMALL = 1024
"""Files of at least so many bytes go through LFS."""


class Hub(ThreadingHTTPServer):
    """Repositories as {(type, name): {file: content}}; every change makes a new commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.commits: dict[tuple[str, str], str] = {}
        self.messages: list[str] = []
        self.private: set[tuple[str, str]] = set()
        self.blobs: dict[str, bytes] = {}
        self.break_after: int | None = None
        """Close the next download's connection after so many bytes."""
        self.corrupt = False
        """Send other bytes than the hash promises."""
        self.requests: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repo: str, repo_type: str = "dataset", **files: bytes) -> None:
        """Put files into a repository; `__` in a name stands for a dot."""
        there = self.repos.setdefault((repo_type, repo), {})
        there.update({name.replace("__", "."): content for name, content in files.items()})
        self.commits[repo_type, repo] = hashlib.sha1(repr(sorted(there.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._resolve(body=False)

    def do_GET(self) -> None:
        self._resolve(body=True)

    def _resolve(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)(/tree/main)?", path):
            key = (found[1], found[2])
            if key not in self.server.repos:
                return self._error(404, "RepoNotFound")
            if found[3]:
                files = self.server.repos[key].items()
                return self._answer([{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
            return self._answer({"id": key[1], "private": key in self.server.private, "sha": self.server.commits[key]})
        found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found:
            return self._error(404, "RepoNotFound")
        key = ("dataset" if found[1] else "model", found[2])
        if key not in self.server.repos:
            return self._error(401, "RepoNotFound")
        if found[3] not in ("main", self.server.commits[key]):
            return self._error(404, "RevisionNotFound")
        content = self.server.repos[key].get(found[4])
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": self.server.commits[key]})
        digest = hashlib.sha256(content).hexdigest()
        start = int(range_[6:].split("-")[0]) if (range_ := self.headers.get("Range")) else 0
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.server.commits[key])
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return None
        sent = bytes(len(content)) if self.server.corrupt else content
        if self.server.break_after is not None:
            self.wfile.write(sent[start : start + self.server.break_after])
            self.close_connection = True
            return None
        self.wfile.write(sent[start:])
        return None

    def do_PUT(self) -> None:
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._answer({})

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        self.server.requests.append(f"POST {path}")
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, None)
        if path == "/api/repos/create":
            asked = json.loads(body)
            key = (
                asked.get("type", "model"),
                f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"],
            )
            url = json.dumps({"url": f"{self.server.url}/{'datasets/' if key[0] == 'dataset' else ''}{key[1]}"}).encode()
            if key in self.server.repos:
                return self._send(409, url, {"Content-Type": "application/json"})
            self.server.put(key[1], key[0])
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(key)
            return self._send(200, url, {"Content-Type": "application/json"})
        if found := re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] >= SMALL else "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**asked, "actions": {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if found := re.fullmatch(r"/api/(dataset|model)s/([^/]+/[^/]+)/commit/main", path):
            return self._commit((found[1], found[2]), [json.loads(line) for line in body.splitlines()])
        return self._error(404, None)

    def _commit(self, key: tuple[str, str], lines: list[dict[str, Any]]) -> None:
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.server.repos[key][value["path"]]
        self.server.put(key[1], key[0], **files)
        commit = self.server.commits[key]
        self._answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{key[1]}/commit/{commit}", "hookOutput": ""}
        )

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, answer: Any, kind: str = "application/json") -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": kind})

    def _error(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": str(code)} if code else {}
        self._send(status, b"{}", {"Content-Type": "application/json", **named, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
