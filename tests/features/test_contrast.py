"""A goal's contrast in the features of an SAE: formulas, planted features, and what must not change the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saets.engine.choice import decoder_for
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import Goal
from saets.features.contrast import FeatureContrast, feature_contrast
from saets.features.reading import FeatureReader, Read
from saets.generation import SteeringWorker
from saets.sae import load_sae
from saets.tokens import encode

WORDS = (
    ("cake", "rings", "friends", "music", "flowers", "dance", "wine", "vows", "guests", "joy", "kisses"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "more"),
)
POSITIVE = tuple(f"a wedding with {word}" for word in WORDS[0])
NEGATIVE = tuple(f"the meeting of {word}, as planned" for word in WORDS[1])


def goal_of(positive: tuple[str, ...] = POSITIVE, negative: tuple[str, ...] = NEGATIVE) -> Goal:
    examples = {side: tuple(f"{side} example {i}" for i in range(8)) for side in ("positive", "negative")}
    contrast = {"positive": positive, "negative": negative}
    return Goal.model_validate({"id": "g", "name": "G", "behaviour": "b", "contrast": contrast, "examples": examples})


@pytest.fixture(scope="module")
def reader(tiny: Any, tiny_experiment: Experiment) -> FeatureReader:
    decoder = decoder_for(tiny, tiny_experiment.hook_name)
    return FeatureReader(decoder, load_sae(tiny_experiment.sae, decoder.d_model))


def long_hand(tiny: Any, reader: FeatureReader, text: str, hook_name: str) -> np.ndarray:
    """Activations of one text alone, [tokens, d_sae], through the bridge."""
    _, cache = tiny.run_with_cache(torch.tensor([encode(tiny.tokenizer, text)]), names_filter=hook_name)
    acts: np.ndarray = reader.sae.encode(cache[hook_name][0]).numpy()
    return acts


def test_each_text_is_averaged_over_its_tokens_and_the_first_positions_are_left_out(
    tiny: Any, reader: FeatureReader, tiny_experiment: Experiment
) -> None:
    found = feature_contrast(reader, tiny.tokenizer, goal_of())
    acts = {text: long_hand(tiny, reader, text, tiny_experiment.hook_name) for text in (*POSITIVE, *NEGATIVE)}
    for side, texts in ((found.positive, POSITIVE), (found.negative, NEGATIVE)):
        assert np.allclose(side, np.stack([acts[text][2:].mean(0) for text in texts]), atol=1e-4)
    kept = np.concatenate([one[2:] for one in acts.values()])
    early = np.concatenate([one[:2] for one in acts.values()]).sum(0)
    total = early + kept.sum(0)
    assert np.allclose(found.early[total > 0], (early / total)[total > 0], atol=1e-3)


def test_mean_standard_error_and_wins_are_those_of_the_paired_differences() -> None:
    positive, negative = np.array([[1.0], [4.0], [1.0]], np.float32), np.array([[0.0], [1.0], [2.0]], np.float32)
    found = FeatureContrast(positive, negative, np.zeros(1, np.float32))
    assert found.mean.tolist() == [1.0]
    assert found.standard_error[0] == pytest.approx(np.sqrt((0 + 4 + 4) / 2 / 3))
    assert found.wins[0] == pytest.approx(2 / 3)


def test_a_feature_that_fires_on_one_text_alone_has_a_standard_error_as_large_as_its_mean() -> None:
    positive = np.zeros((12, 1), np.float32)
    positive[3] = 7.0
    found = FeatureContrast(positive, np.zeros_like(positive), np.zeros(1, np.float32))
    assert found.standard_error[0] == pytest.approx(found.mean[0], rel=1e-6)


def test_texts_read_together_give_what_each_gives_alone_whatever_their_order(
    tiny: Any, reader: FeatureReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = feature_contrast(reader, tiny.tokenizer, goal_of())
    backwards = feature_contrast(reader, tiny.tokenizer, goal_of(POSITIVE[::-1], NEGATIVE[::-1]))
    monkeypatch.setattr("saets.features.reading.TOKENS_AT_ONCE", 1)
    alone = feature_contrast(reader, tiny.tokenizer, goal_of())
    for name in ("positive", "negative"):
        assert np.allclose(getattr(together, name), getattr(alone, name), atol=1e-4)
        assert np.allclose(getattr(together, name), getattr(backwards, name)[::-1], atol=1e-4)
    for name in ("mean", "standard_error", "early"):
        assert np.allclose(getattr(together, name), getattr(alone, name), atol=2e-3)


def test_padding_is_neither_counted_nor_early(reader: FeatureReader) -> None:
    texts = [[256, 1, 2, 3, 4], [256, 5], [256, 6, 7]]
    reads: list[Read] = list(reader.read(texts))
    assert [read.texts for read in reads] == [[1, 2, 0]]
    assert reads[0].counted.sum(1).tolist() == [0, 1, 3]
    assert reads[0].early.sum(1).tolist() == [2, 2, 2]
    assert reads[0].acts.shape == (3, 5, reader.d_sae)


def test_no_pass_holds_more_tokens_than_it_may(reader: FeatureReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saets.features.reading.TOKENS_AT_ONCE", 12)
    texts = [[256, *range(length)] for length in (1, 2, 3, 4, 5, 20)]
    reads = list(reader.read(texts))
    assert [read.tokens.numel() for read in reads] == [12, 12, 21]
    assert sorted(number for read in reads for number in read.texts) == list(range(6))


def test_a_text_with_nothing_left_after_the_skipped_positions_is_refused(tiny: Any, reader: FeatureReader) -> None:
    with pytest.raises(InputError, match="'x' has 2 tokens with BOS.*skip fewer"):
        feature_contrast(reader, tiny.tokenizer, goal_of(positive=("x", *POSITIVE[1:])))


def test_a_worker_reads_the_contrast_with_the_experiments_sae(
    tiny: Any, reader: FeatureReader, tiny_experiment: Experiment
) -> None:
    worker = SteeringWorker(tiny_experiment)
    assert "sae" not in vars(worker)
    found, expected = worker.feature_contrast(goal_of()), feature_contrast(reader, tiny.tokenizer, goal_of())
    assert np.array_equal(found.positive, expected.positive)
    fewer = worker.feature_contrast(goal_of(), skip_positions=1)
    assert not np.array_equal(fewer.positive, found.positive)
