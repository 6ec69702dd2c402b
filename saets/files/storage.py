"""Where a run lies: a folder or file on a local or shared file system, or in an object store such as S3.

Everything a run reads and writes goes through `Location`, with the credentials and the endpoint that pyarrow finds for itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem

from saets.errors import InputError

OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems, by pyarrow's names, in which a write is whole by itself and replaces what was there."""

FIRST_ANSWER_SECONDS = 20.0
"""A service that has not answered by then is taken for unreachable; pyarrow's retries may go on for a quarter of an hour."""

SILENCE_SECONDS = 10.0
"""An S3 request on which nothing moves for so long is tried again, three times in all; pyarrow by itself waits for ever."""


def is_uri(where: Where) -> bool:
    """Whether this is a URI with a scheme, not a local path."""
    return isinstance(where, str) and "://" in where


def locate(where: Where) -> Location:
    """The location that a path or URI names; `Location.check` asks whether it can be reached.

    Raises:
        InputError: a URI of an unknown scheme or form.
    """
    if isinstance(where, Location):
        return where
    if not is_uri(where):
        return Location(LocalFileSystem(), os.path.abspath(where), str(where))
    shown = without_secrets(str(where))
    try:
        filesystem, path = _within_deadline(lambda: FileSystem.from_uri(where))
        if not path:
            raise ValueError("it names no bucket")
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).replace(str(where), shown).split())[:300]
        raise InputError(
            f"{shown} cannot be used ({reason}); expected a local path or a URI such as s3://bucket/folder, gs://bucket/folder "
            "or hdfs://host/folder"
        ) from error
    return Location(_impatient(filesystem), path.rstrip("/"), shown)


def _impatient(filesystem: FileSystem) -> FileSystem:
    """The same file system; one of S3 with a time limit, which no URI can give it. Its pickled form holds its other options."""
    if filesystem.type_name != "s3":
        return filesystem
    rebuild, (options,) = filesystem.__reduce__()
    return rebuild({**options, "connect_timeout": SILENCE_SECONDS, "request_timeout": SILENCE_SECONDS})


def _within_deadline(ask: Callable[[], Any]) -> Any:
    """What `ask` returns or raises; a TimeoutError where it takes longer than `FIRST_ANSWER_SECONDS`."""
    answers: list[Any] = []
    errors: list[Exception] = []

    def listen() -> None:
        try:
            answers.append(ask())
        except Exception as error:
            errors.append(error)

    asking = threading.Thread(target=listen, daemon=True)
    asking.start()
    asking.join(FIRST_ANSWER_SECONDS)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer in {FIRST_ANSWER_SECONDS:g} seconds")
    return answers[0]


def without_secrets(uri: str) -> str:
    """The URI as it may be shown: options and a password left out."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{user.partition(':')[0]}{at}{host}{parts.path}".rstrip("/")


@dataclass(frozen=True)
class Location:
    """A file or folder, there or not; `/` names what is in it, and its text form is what the user wrote."""

    _filesystem: FileSystem = field(repr=False)
    _path: str = field(repr=False)
    _shown: str

    def __str__(self) -> str:
        return self._shown

    def __truediv__(self, name: str) -> Location:
        return Location(self._filesystem, f"{self._path}/{name}", f"{self._shown}/{name}")

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self._path.rpartition("/")[2]

    def beside(self, name: str) -> Location:
        """The file or folder of another name in the same folder."""
        return Location(self._filesystem, f"{self._path.rpartition('/')[0]}/{name}", f"{self._shown.rpartition('/')[0]}/{name}")

    @property
    def local(self) -> Path | None:
        """The path on this machine's file systems, or None."""
        return Path(self._path) if isinstance(self._filesystem, LocalFileSystem) else None

    def check(self) -> None:
        """Raise `InputError` where the service does not answer or the bucket is not there."""
        if self.local is not None:
            return
        bucket = self._path.partition("/")[0]
        root = bucket if self._filesystem.type_name in OBJECT_STORES else "/"
        try:
            found = _within_deadline(lambda: self._filesystem.get_file_info(root))
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"cannot reach {self}: {self._reason(error)}; check the address, the network and the credentials (for S3 "
                "AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION)"
            ) from error
        if found.type == FileType.NotFound:
            raise InputError(f"{self}: there is no bucket {bucket!r}; make it first, or give the name of one that exists")

    def is_file(self) -> bool:
        """Whether a file is there."""
        return self._info().type == FileType.File

    def is_folder(self) -> bool:
        """Whether a folder is there; in an object store, whether anything lies below this name."""
        return self._info().type == FileType.Directory

    def entries(self) -> dict[str, FileInfo]:
        """What lies directly in this folder, by name, in order of names; nothing where there is no folder."""
        with self._failing("read"):
            found = self._filesystem.get_file_info(FileSelector(self._path, allow_not_found=True))
        return {info.base_name: info for info in sorted(found, key=lambda info: info.base_name)}

    def open(self) -> pa.NativeFile:
        """The file for reading at any place. Errors are pyarrow's: a reader may have to tell a damaged file from a lost one."""
        return self._filesystem.open_input_file(self._path)

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self._failing("read"), self.open() as file:
            return file.read()

    def read_text(self) -> str:
        """The whole content as UTF-8; what is not UTF-8 is a UnicodeDecodeError."""
        return self.read_bytes().decode()

    def write_bytes(self, content: bytes) -> None:
        """Write a file so that a reader sees the old one or the new one, never a part; folders are made.

        Raises:
            InputError: it cannot be written or the disk is full; what was there is still there.
        """
        with self._failing("write"):
            if self._filesystem.type_name in OBJECT_STORES:
                self._put(self._path, content)
                return
            folder = self._path.rpartition("/")[0]
            temporary = f"{folder}/.{self.name}.{uuid.uuid4().hex[:8]}.part"
            self._filesystem.create_dir(folder, recursive=True)
            try:
                self._put(temporary, content)
                if self._filesystem.type_name == "hdfs":  # its rename does not replace
                    with contextlib.suppress(FileNotFoundError):
                        self._filesystem.delete_file(self._path)
                self._filesystem.move(temporary, self._path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._filesystem.delete_file(temporary)
                raise

    def write_text(self, text: str) -> None:
        """`write_bytes` of the text in UTF-8."""
        self.write_bytes(text.encode())

    def rename(self, name: str) -> None:
        """Give the file another name in its folder; in an object store a copy, then a deletion."""
        with self._failing("write"):
            self._filesystem.move(self._path, f"{self._path.rpartition('/')[0]}/{name}")

    def delete(self) -> None:
        """Delete the file; nothing where there is none."""
        with self._failing("delete"), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path)

    def delete_folder(self) -> None:
        """Delete the folder and all in it; nothing where there is none."""
        with self._failing("delete"), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path)

    @property
    def for_pyarrow(self) -> tuple[FileSystem, str]:
        """pyarrow's file system, and the path there, for a library that writes by itself."""
        return self._filesystem, self._path

    def _put(self, path: str, content: bytes) -> None:
        """All in one write: an upload is completed only after every part of it has arrived."""
        with self._filesystem.open_output_stream(path) as file:
            file.write(content)

    def _info(self) -> FileInfo:
        with self._failing("read"):
            return self._filesystem.get_file_info(self._path)

    @contextlib.contextmanager
    def _failing(self, doing: str) -> Iterator[None]:
        """Turn what pyarrow raises into an `InputError` that says what to do."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            advice = "make room or choose another --out" if doing == "write" else "check that it is there and may be used"
            raise InputError(
                f"cannot {doing} {self}: {self._reason(error)}; {advice}, then run the same command again: everything written "
                "so far is kept"
            ) from error

    def _reason(self, error: BaseException) -> str:
        """The system's own words for a local file, else what the service said."""
        number = error.errno if isinstance(error, OSError) else None
        return os.strerror(number) if number and self.local is not None else " ".join(str(error).split())


Where = str | Path | Location
"""How callers may name a file or folder; `locate` makes one type of it."""


def shareable(value: Any) -> Any:
    """The same JSON-like value, with paths of this machine and secrets in URIs taken out of its texts."""
    if isinstance(value, dict):
        return {shareable(key): shareable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    if not isinstance(value, str):
        return value
    if is_uri(value):
        return re.sub("//[^/@]*@", "//", without_secrets(value))
    return Path(value).name if os.path.isabs(value) else value
