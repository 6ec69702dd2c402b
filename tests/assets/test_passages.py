"""Passages are cut between words, and a source that is not there is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from assets import passages
from assets.parts import Build, Part
from assets.settings import Settings

from saets.errors import InputError
from saets.model import ByteTokenizer

TEXT = (
    "It rained in the extraordinarily old town of Bath, and nobody who lived there was surprised by the weather at all. They "
    "don't mind well-known rain; in 1,984 of 2,000 days it had rained before."
)


def test_chunks_begin_with_bos_and_where_a_word_does() -> None:
    tokenizer = ByteTokenizer.build()
    chunks = list(passages.chunked(tokenizer, TEXT, 24))
    assert all(chunk[0] == tokenizer.bos_token_id and len(chunk) <= 24 for chunk in chunks)
    texts = [tokenizer.decode(chunk[1:]) for chunk in chunks]
    assert TEXT.startswith("".join(texts))
    assert len(texts) > 3
    assert all(text[0] == " " for text in texts[1:])


def test_a_word_longer_than_a_chunk_ends_the_passage() -> None:
    assert list(passages.chunked(ByteTokenizer.build(), "a" * 100, 24)) == []


def test_marks_of_dictionaries_are_taken_out() -> None:
    assert passages.tidy("{Bath} n. a\n   vessel [1913 Webster]") == "Bath n. a vessel"


def test_a_source_that_is_not_there_is_named_with_its_package_and_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    here = passages.Source(("dict-here",), "MIT", 0.5, lambda: [TEXT, TEXT[::-1]])
    gone = passages.Source(("dict-gone",), "MIT", 0.5, list)
    monkeypatch.setattr(passages, "SOURCES", {"here": here, "gone": gone})
    parts = {"passages": Part(passages.make, ("subject", "passages"), check=passages.check)}
    with pytest.raises(InputError, match="no text of gone: apt-get install dict-gone, or leave it out with --skip gone"):
        Build(tmp_path, Settings().replaced(["passages.tokens=100"]), parts, tiny_folder).make(["passages"])
    told = ["passages.tokens=100", 'passages.skip=["gone"]']
    build = Build(tmp_path, Settings().replaced(told), parts, tiny_folder)
    build.make(["passages"])
    assert build.facts("passages")["sources"]["here"]["licence"] == "MIT"
    assert sum(len(chunk) for chunk in passages.chunks(build)) == build.facts("passages")["tokens"] >= 100


@pytest.mark.parametrize(
    ("skip", "said"),
    [(["gcid"], "unknown source of passages 'gcid'.*did you mean 'gcide'"), (list(passages.SOURCES), "at least one")],
)
def test_an_unknown_source_and_no_source_at_all_are_refused(tmp_path: Path, skip: list[str], said: str) -> None:
    settings = Settings().replaced([f"passages.skip={skip}"])
    with pytest.raises(InputError, match=said):
        passages.wanted(Build(tmp_path, settings, {}))
