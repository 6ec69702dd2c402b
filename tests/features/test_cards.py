"""Densities and contexts: of a corpus, against counting by hand, and those that come with an SAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from saets.engine.choice import decoder_for
from saets.errors import InputError
from saets.experiment.config import PRESETS, Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.features.cards import CONTEXTS, PIECE, corpus_file, pieces, shipped_cards, small_corpus, survey
from saets.features.reading import FeatureReader
from saets.sae import load_sae
from saets.terminal.progress import Silent
from saets.tokens import encode

TEXTS = [
    "A ship left the harbour at dawn.",
    "[red] cats sleep",
    "The judge read the letter twice.",
    "Rain.",
    "Seven dogs ran.",
    "No more tea, thank you.",
    "Two plus two is four",
]


@pytest.fixture(scope="module")
def reader(tiny: Any, tiny_experiment: Experiment) -> FeatureReader:
    decoder = decoder_for(tiny, tiny_experiment.hook_name)
    return FeatureReader(decoder, load_sae(tiny_experiment.sae, decoder.d_model))


def tokens_of(tiny: Any, texts: list[str] = TEXTS) -> list[list[int]]:
    return [encode(tiny.tokenizer, text) for text in texts]


def test_density_and_contexts_are_those_of_each_text_by_itself(tiny: Any, reader: FeatureReader) -> None:
    texts = tokens_of(tiny)
    cards = survey(reader, tiny.tokenizer, texts, Silent())
    acts = [reader.encode(reader.decoder.lower(torch.tensor([text])))[0, 2:] for text in texts]
    assert np.allclose(cards.density, (torch.cat(acts) > 0).float().mean(0).numpy(), atol=2e-3)
    for feature in range(0, reader.d_sae, 9):
        peaks = sorted((one[:, feature].max().item() for one in acts), reverse=True)[:CONTEXTS]
        found = cards.contexts(feature)
        assert [context.activation for context in found] == pytest.approx([peak for peak in peaks if peak > 0], abs=1e-4)
        for context in found:
            number = next(i for i, text in enumerate(TEXTS) if "".join(context[1:]) in text)
            own = acts[number][:, feature]
            assert context.activation == pytest.approx(own.max().item(), abs=1e-4)
            assert tiny.tokenizer.decode([texts[number][2 + int(own.argmax())]]) == context.token


def test_the_order_of_texts_and_the_size_of_passes_do_not_change_the_cards(
    tiny: Any, reader: FeatureReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tokens_of(tiny)
    cards = survey(reader, tiny.tokenizer, texts, Silent())
    monkeypatch.setattr("saets.features.reading.TOKENS_AT_ONCE", 1)
    other = survey(reader, tiny.tokenizer, texts[::-1], Silent())
    assert np.allclose(cards.density, other.density, atol=2e-3)
    for feature in range(0, reader.d_sae, 9):
        assert [context[1:] for context in cards.contexts(feature)] == [context[1:] for context in other.contexts(feature)]


def test_long_texts_are_cut_and_a_corpus_ends_at_its_limit(tiny: Any) -> None:
    found = pieces(tiny.tokenizer, ["x" * 100, "short"], 1000)
    assert [len(piece) for piece in found] == [PIECE, 100 - (PIECE - 1) + 1, 6]
    assert {piece[0] for piece in found} == {256}
    assert len(pieces(tiny.tokenizer, ["x" * 100, "short"], PIECE + 1)) == 1


def test_the_small_corpus_holds_the_calibration_text_and_the_texts_of_every_goal(tiny: Any, tiny_experiment: Experiment) -> None:
    love = load_goal("love")
    contrast = love.contrast.model_copy(update={"positive": ("A zebra. " * 3,) * 12})
    corpus = small_corpus(tiny.tokenizer, tiny_experiment, love.model_copy(update={"id": "mine", "contrast": contrast}))
    there = "\n".join(tiny.tokenizer.decode(piece, skip_special_tokens=True) for piece in corpus)
    for text in (contrast.positive[0], load_goal("anger").contrast.positive[0], (PRESETS / "calibration.txt").read_text()):
        assert text[: PIECE - 1] in there


def test_the_cards_that_come_with_the_package_are_of_its_own_sae_alone() -> None:
    shipped = shipped_cards(load_experiment("smollm2").sae)
    frame = pl.read_parquet(PRESETS / "smollm2" / "cards.parquet")
    assert shipped is not None
    assert shipped.density.tolist() == frame["density"].to_list()
    (love, _), *_ = load_goal("love").features["smollm2"].target
    assert shipped.contexts(love)[0].token.strip() == "love"
    assert shipped_cards(load_experiment("tiny").sae) is None
    assert shipped_cards(load_experiment("gemma-2-2b").sae) is None


def test_a_corpus_that_is_missing_empty_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    with pytest.raises(InputError, match="cannot be read"):
        corpus_file(path)
    path.write_text("\n \n")
    with pytest.raises(InputError, match="is empty"):
        corpus_file(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        corpus_file(path)
    path.write_text("one\n\ntwo\n")
    assert corpus_file(path) == ["one", "two"]
