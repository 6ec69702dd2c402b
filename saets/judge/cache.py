"""Replies on disk, by what was asked: shared by all runs, so that none is paid for twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from saets.errors import InputError
from saets.experiment.config import JudgeSettings


class Reply(NamedTuple):
    """What a model said, and the tokens it took where the server told."""

    text: str
    tokens_in: int | None
    tokens_out: int | None


def question_key(asked: dict[str, Any]) -> str:
    """64 hex digits that identify what was asked of whom."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def cache_folder(settings: JudgeSettings) -> Path | None:
    """Where replies are kept: `judge.cache`, by default a folder of the user's; None where it is switched off.

    Raises:
        InputError: it is a file, or may not be written.
    """
    if settings.cache is False:
        return None
    folder = _user_folder() / "replies" if settings.cache is True else Path(settings.cache)
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(
            f"the judge's replies cannot be kept in {folder}: {there} is "
            f"{'not writable' if there.is_dir() else 'no folder'}; set judge.cache to a folder of yours, or to false to keep none"
        )
    return folder


def _user_folder() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "saets"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "saets"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "saets" / "Cache"
    return Path.home() / ".cache" / "saets"


class ReplyCache:
    """A file a reply, written whole under its final name, so any number of processes may share the folder.

    The file's first line is a digest of the rest: an entry that was cut or changed is none, and is asked again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> Reply | None:
        """The reply to a question, or None."""
        try:
            digest, _, body = self._path(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        if digest.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            return None
        entry = json.loads(body)
        return Reply(entry["reply"], entry["tokens_in"], entry["tokens_out"]) if entry["key"] == key else None

    def write(self, key: str, reply: Reply, about: dict[str, Any]) -> None:
        """Keep a reply, with a few words about where it comes from.

        Raises:
            InputError: it cannot be written.
        """
        entry = {"key": key, "reply": reply.text, "tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out, **about}
        body = json.dumps(entry).encode()
        path = self._path(key)
        temporary = path.with_name(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InputError(
                f"a reply of the judge cannot be kept in {self.folder}: {error.strerror}; make room or set judge.cache to "
                "another folder, then run the same command again"
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key
