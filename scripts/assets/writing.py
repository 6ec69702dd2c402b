"""Part `writing`: text that the model writes, unsteered, on many topics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from assets import topics
from assets.language_model import LanguageModel
from assets.parts import Build, Need, Progress, digest, save_arrays
from assets.settings import Settings
from saets.engine.batch import Row
from saets.engine.sampling import row_seed
from saets.tokens import encode

FILE_TEXTS = 336
"""Texts written together, and kept in one file."""


def need(settings: Settings) -> Need:
    """Two bytes a token."""
    return Need(disk=3 * settings.writing.tokens, memory=4e9)


def openings(build: Build) -> list[str]:
    """What the texts begin with."""
    return topics.prompts(build.settings.writing.tokens // build.settings.writing.length, build.settings.subject.seed)


def begun_with(build: Build) -> str:
    """A digest of the openings, which decide the texts."""
    return digest(openings(build))


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """Texts in files of one batch each: token ids [texts, length], and where the model's own tokens start."""
    settings, seed, prompts = build.settings.writing, build.settings.subject.seed, openings(build)
    starts = range(0, len(prompts), FILE_TEXTS)
    missing = [start for start in starts if not _file(folder, start).exists()]
    if missing:
        loaded = LanguageModel.load(build)
        engine = loaded.engine(0, top_k=settings.top_k, temperature=settings.temperature)
        done = (len(starts) - len(missing)) * FILE_TEXTS
        progress = Progress("writing, tokens", len(prompts) * settings.length, done * settings.length)
    for start in missing:
        part = prompts[start : start + FILE_TEXTS]
        rows = [Row(prompt, row_seed(seed, "writing", start + i)) for i, prompt in enumerate(part)]
        tokens = engine.run(rows, None, settings.length).tokens.numpy().astype(np.uint16)
        written = np.array([len(encode(loaded.tokenizer, prompt)) for prompt in part], np.uint16)
        save_arrays(_file(folder, start), tokens=tokens, starts=written)
        progress.at((start + len(part)) * settings.length)
    return {"texts": len(prompts), "tokens": len(prompts) * settings.length}


def texts(build: Build) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids of each text, and at which position the model's own begin."""
    for path in sorted(build.folder("writing").glob("texts-*.npz")):
        with np.load(path) as file:
            yield from zip(file["tokens"], file["starts"].tolist(), strict=True)


def _file(folder: Path, start: int) -> Path:
    return folder / f"texts-{start:07d}.npz"
