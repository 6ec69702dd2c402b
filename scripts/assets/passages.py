"""Part `passages`: text from Debian packages, in chunks that begin and end between words. None of it is shipped."""

from __future__ import annotations

import gzip
import html
import itertools
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from assets.language_model import load_tokenizer
from assets.parts import Build, Need, Progress, digest, save_arrays
from assets.settings import Settings
from saets.errors import InputError, unknown
from saets.tokens import encode

SHORTEST, SHORTEST_CHUNK = 80, 16
"""Characters of a passage and tokens of a chunk below which they are left out."""


SPACES = " \n\u0120\u010a\u2581"
"""Spaces and line ends, also as tokenizers write them. What follows an apostrophe or a hyphen is no start of a word."""


class Source(NamedTuple):
    """Where passages come from."""

    packages: tuple[str, ...]
    """Debian packages to install."""
    licence: str
    share: float
    """Part of all tokens, as long as its passages last."""
    passages: Callable[[], Iterable[str]]
    """All of them; none where the package is not installed."""


def need(settings: Settings) -> Need:
    """Two bytes a token, and the text itself in memory."""
    return Need(disk=3 * settings.passages.tokens, memory=2e9)


def check(build: Build) -> None:
    """Raise `InputError` where sources that are not to be skipped are not there, naming all of them."""
    gone = {name: source for name, source in wanted(build).items() if next(iter(source.passages()), None) is None}
    if gone:
        packages = " ".join(package for source in gone.values() for package in source.packages)
        raise InputError(
            f"no text of {', '.join(gone)}: apt-get install {packages}, or leave it out with "
            f"{' '.join(f'--skip {name}' for name in gone)}"
        )


def sources(build: Build) -> str:
    """A digest of what decides how much comes from where."""
    return digest(f"{name} {source.share}" for name, source in wanted(build).items())


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """`chunks.npz`: token ids one chunk after another, and how long each is; mixed from all sources."""
    settings = build.settings.passages
    chosen = wanted(build)
    tokenizer = load_tokenizer(build)
    total = sum(source.share for source in chosen.values())
    progress = Progress("passages, tokens", settings.tokens)
    chunks: list[list[int]] = []
    facts = {}
    done = 0
    for name, source in chosen.items():
        budget = int(settings.tokens * source.share / total)
        texts = list(dict.fromkeys(text for text in map(tidy, source.passages()) if len(text) > SHORTEST))
        random.Random(build.settings.subject.seed).shuffle(texts)
        before = done
        for text in texts:
            for chunk in chunked(tokenizer, text, settings.chunk):
                chunks.append(chunk)
                done += len(chunk)
            progress.at(done)
            if done - before > budget:
                break
        if done - before < budget:
            print(f"passages: {name} has {done - before:,} tokens of the {budget:,} that were to come from it", file=sys.stderr)
        facts[name] = {"tokens": done - before, "licence": source.licence}
    random.Random(build.settings.subject.seed).shuffle(chunks)
    tokens = np.fromiter(itertools.chain(*chunks), np.uint16)
    save_arrays(folder / "chunks.npz", tokens=tokens, lengths=np.array([*map(len, chunks)], np.uint16))
    return {"tokens": done, "chunks": len(chunks), "sources": facts}


def chunks(build: Build) -> Iterator[np.ndarray]:
    """Token ids of each chunk, BOS first."""
    with np.load(build.folder("passages") / "chunks.npz") as file:
        tokens, lengths = file["tokens"], file["lengths"].astype(np.int64)
    yield from np.split(tokens, lengths.cumsum()[:-1])


def wanted(build: Build) -> dict[str, Source]:
    """The sources without those to skip.

    Raises:
        InputError: an unknown name, or nothing left.
    """
    skip = build.settings.passages.skip
    for name in skip:
        if name not in SOURCES:
            raise unknown("source of passages", name, SOURCES)
    left = {name: source for name, source in SOURCES.items() if name not in skip}
    if not left:
        raise InputError("all sources of passages are skipped; leave at least one")
    return left


def chunked(tokenizer: Any, text: str, length: int) -> Iterator[list[int]]:
    """BOS and at most `length` - 1 tokens of the text each; a chunk starts where a word does, short remains are left out."""
    bos, *tokens = encode(tokenizer, text)
    begins = [piece[0] in SPACES for piece in tokenizer.convert_ids_to_tokens(tokens)]
    start = 0
    while len(tokens) - start >= SHORTEST_CHUNK - 1:
        end = min(start + length - 1, len(tokens))
        while end < len(tokens) and end > start and not begins[end]:
            end -= 1
        if end == start:
            return
        yield [bos, *tokens[start:end]]
        start = end


def tidy(text: str) -> str:
    """Without the marks of dictionaries and with single spaces."""
    text = re.sub(r"\[1913 Webster\]|\[PJC\]|\[Webster 1913 Suppl\.\]|[{}\\]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _dictionary(name: str) -> Callable[[], Iterator[str]]:
    def entries() -> Iterator[str]:
        path = Path("/usr/share/dictd") / f"{name}.dict.dz"
        if path.is_file():
            yield from re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode("utf-8", "ignore"))

    return entries


def _fortunes() -> Iterator[str]:
    for path in sorted(Path("/usr/share/games/fortunes").glob("*.u8")):
        if "art" not in path.name:
            yield from path.read_text(errors="ignore").split("\n%\n")


def _pages(pattern: str) -> Callable[[], Iterator[str]]:
    """Paragraphs of HTML pages."""

    def paragraphs() -> Iterator[str]:
        for path in sorted(Path("/usr/share").glob(pattern)):
            page = re.sub(r"(?s)<(script|style|pre|head)\b.*?</\1>", " ", path.read_text(encoding="utf-8", errors="ignore"))
            for found in re.findall(r"(?s)<p\b[^>]*>(.*?)</p>|<div class=\"para\">(.*?)</div>", page):
                yield html.unescape(re.sub(r"<[^>]*>", "", "".join(found)))

    return paragraphs


def _bible() -> Iterator[str]:
    """Passages of six verses."""
    try:
        text = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return
    verses = [line.split(" ", 1)[1] for line in text.splitlines() if " " in line]
    for start in range(0, len(verses), 6):
        yield " ".join(verses[start : start + 6])


SOURCES = {
    "gcide": Source(("dict-gcide",), "GPL-2+", 0.30, _dictionary("gcide")),
    "wordnet": Source(("dict-wn",), "WordNet licence", 0.20, _dictionary("wn")),
    "bible": Source(("bible-kjv", "bible-kjv-text"), "public domain", 0.12, _bible),
    "anarchism": Source(("anarchism",), "GPL-2", 0.12, _pages("doc/anarchism/html/*.html")),
    "foldoc": Source(("dict-foldoc",), "GFDL-1.1+", 0.06, _dictionary("foldoc")),
    "fortunes": Source(("fortunes",), "BSD-4-clause", 0.08, _fortunes),
    "gimp-fr": Source(("gimp-help-fr",), "GFDL-1.2+", 0.06, _pages("gimp/2.0/help/fr/*.html")),
    "handbook-fr": Source(("debian-handbook",), "GPL-2+ or CC-BY-SA-3.0", 0.06, _pages("doc/debian-handbook/html/fr-FR/*.html")),
}
"""English of many kinds, and French."""
