"""Replies on disk: whole or not there, whoever writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from saets.errors import InputError
from saets.experiment.config import JudgeSettings
from saets.judge.cache import Reply, ReplyCache, cache_folder, question_key

REPLY = Reply('{"score": 7} \u2039', 312, 6)


@pytest.fixture
def cache(tmp_path: Path) -> ReplyCache:
    return ReplyCache(tmp_path / "replies")


def entry(cache: ReplyCache) -> Path:
    """The one file in the cache."""
    (found,) = (path for path in cache.folder.rglob("*") if path.is_file())
    return found


def test_a_reply_comes_back_as_it_was(cache: ReplyCache) -> None:
    key = question_key({"message": "a"})
    assert cache.read(key) is None
    cache.write(key, REPLY, {"model": "m"})
    assert ReplyCache(cache.folder).read(key) == REPLY
    assert cache.read(question_key({"message": "b"})) is None


def test_a_question_is_the_same_in_any_order_and_another_with_any_part_changed() -> None:
    asked = {"model": "m", "address": "http://a/v1", "message": "x"}
    assert question_key(asked) == question_key(dict(reversed(asked.items())))
    others = [question_key({**asked, name: "other"}) for name in asked]
    assert len({question_key(asked), *others}) == 4


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "moved"])
def test_a_damaged_entry_is_none(cache: ReplyCache, damage: str) -> None:
    key = question_key({"message": "a"})
    cache.write(key, REPLY, {})
    path = entry(cache)
    content = path.read_bytes()
    if damage == "moved":
        key = key[:2] + question_key({"message": "b"})[2:]
        path.rename(path.with_name(key))
    else:
        changed = {"cut": content[:-9], "changed": content.replace(b"7", b"9"), "empty": b""}[damage]
        path.write_bytes(changed)
    assert cache.read(key) is None
    cache.write(key, REPLY, {})
    assert cache.read(key) == REPLY


WRITER = """
import sys
from pathlib import Path
from saets.judge.cache import Reply, ReplyCache, question_key
cache = ReplyCache(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(200):
    key = question_key({"message": str(turn % 10)})
    cache.write(key, Reply(f"{turn % 10} " * 2000, None, None), {})
    assert cache.read(key).text == f"{turn % 10} " * 2000
"""


def test_processes_that_write_the_same_replies_at_once_never_see_half_of_one(cache: ReplyCache) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n", timeout=60)
    assert [writer.returncode for writer in writers] == [0, 0]
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) == 10 and not any(path.name.endswith(".part") for path in files)


def test_the_folder_is_the_users_cache_unless_set_or_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(JudgeSettings()) == tmp_path / "saets" / "replies"
    assert cache_folder(JudgeSettings(cache=str(tmp_path / "mine"))) == tmp_path / "mine"
    assert cache_folder(JudgeSettings(cache=False)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be kept in .*file is no folder; set judge\.cache"):
        cache_folder(JudgeSettings(cache=str(tmp_path / "file" / "replies")))


def test_a_reply_that_cannot_be_written_is_said_and_leaves_nothing(cache: ReplyCache) -> None:
    key = question_key({"message": "a"})
    cache.folder.mkdir()
    (cache.folder / key[:2]).write_text("in the way")
    with pytest.raises(InputError, match="cannot be kept in .*; make room or set judge.cache to another folder"):
        cache.write(key, REPLY, {})
    assert [path.name for path in cache.folder.iterdir()] == [key[:2]]
