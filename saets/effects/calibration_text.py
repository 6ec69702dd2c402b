"""The text on which scales are calibrated, in chunks of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from saets.errors import InputError
from saets.experiment.config import DATASET, Effects, packaged
from saets.shapes import Int
from saets.tokens import encode


def calibration_tokens(tokenizer: Any, settings: Effects) -> Int[Tensor, "chunks length"]:
    """The calibration text in chunks of `calibration_length` tokens, each BOS and then a run of one passage's tokens.

    Raises:
        InputError: text missing or too short.
    """
    wanted = settings.calibration_chunks
    found = list(itertools.islice(_chunks(tokenizer, settings), wanted))
    if len(found) < wanted:
        raise InputError(
            f"calibration text {settings.calibration_text} gives {len(found)} chunks of {settings.calibration_length} tokens; "
            f"effects.calibration_chunks asks for {wanted}: give a longer text or ask for fewer"
        )
    return torch.tensor(found)


def held_out_tokens(tokenizer: Any, settings: Effects) -> Int[Tensor, "chunks length"]:
    """The chunks that follow those of `calibration_tokens`, at most as many: text on which no scale was calibrated.

    Raises:
        InputError: text missing, or none left.
    """
    wanted = settings.calibration_chunks
    found = list(itertools.islice(_chunks(tokenizer, settings), wanted, 2 * wanted))
    if not found:
        raise InputError(
            f"calibration text {settings.calibration_text} has nothing left after the {wanted} chunks of "
            "effects.calibration_chunks; give a longer text to measure on text that was held out"
        )
    return torch.tensor(found)


def _chunks(tokenizer: Any, settings: Effects) -> Iterator[list[int]]:
    length = settings.calibration_length
    for passage in passages(settings.calibration_text):
        bos, *tokens = encode(tokenizer, passage)
        for at in range(0, len(tokens) - length + 2, length - 1):
            yield [bos, *tokens[at : at + length - 1]]


def passages(source: str) -> Iterable[str]:
    """The passages of a calibration text: a packaged file (`preset:NAME`), another file, or a dataset (`dataset:NAME`).

    Raises:
        InputError: it is missing.
    """
    if source.startswith(DATASET):
        return _dataset(source.removeprefix(DATASET))
    path = packaged(source)
    if not path.is_file():
        raise InputError(f"no such calibration text: {path}")
    return path.read_text(encoding="utf-8").splitlines()


def _dataset(name: str) -> Iterable[str]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        return (row["text"] for row in rows)
    except (OSError, ValueError) as error:
        raise InputError(
            f"calibration dataset {name!r} could not be opened: {str(error).strip().splitlines()[0]} "
            "Set effects.calibration_text to a text file, or run where the hub can be reached"
        ) from error
