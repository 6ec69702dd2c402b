"""Figures of texts that need no judge, against the model itself and counts by hand."""

from __future__ import annotations

import math
from typing import Any

import polars as pl
import pytest
import torch

from saets.records import Generation
from saets.scores.measures import CompletionTokens, completion_losses, distinct, measure_texts
from saets.scores.page import measures_section
from saets.scores.results import measure_table
from saets.tokens import encode


def text(completion: str, prompt: str = "I think", sample: int = 0) -> Generation:
    return Generation(f"{prompt}{completion}{sample}", "london", "caa", "v", 4.0, prompt, sample, 0, completion)


def test_the_loss_is_the_models_own_of_the_completions_tokens_alone(tiny: Any) -> None:
    (found,) = measure_texts(tiny, [text(" so")])
    tokens = torch.tensor([encode(tiny.tokenizer, "I think so")])
    logprobs = tiny(tokens).log_softmax(dim=-1)[0]
    by_hand = [-logprobs[place - 1, tokens[0, place]].item() for place in range(8, 11)]
    assert found.loss == pytest.approx(sum(by_hand) / 3, abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(sum(by_hand) / 3), rel=1e-4)
    assert (found.n_tokens, found.n_words) == (3, 1)


def test_a_text_has_the_same_figures_whatever_it_is_measured_with(tiny: Any) -> None:
    texts = [text("a" * length, prompt) for length in (1, 30, 7) for prompt in ("", "The weather")]
    together = measure_texts(tiny, texts)
    for each, found in zip(texts, together, strict=True):
        (alone,) = measure_texts(tiny, [each])
        assert alone.loss == pytest.approx(found.loss, abs=1e-4)
        assert alone.generation_id == found.generation_id


def test_a_text_that_says_nothing_has_lengths_and_no_other_figure(tiny: Any) -> None:
    found, beside = measure_texts(tiny, [text(""), text(" yes")])
    assert (found.loss, found.perplexity, found.distinct_1, found.distinct_2, found.repetition) == (None,) * 5
    assert (found.n_tokens, found.n_words) == (0, 0)
    assert beside.loss is not None


def test_variety_and_repetition_by_hand(tiny: Any) -> None:
    loop, plain, odd = measure_texts(tiny, [text("ha, ha, ha, ha, ha, ha,"), text("The cat sat on a mat"), text("x\x00\ud800")])
    assert loop.distinct_1 == pytest.approx(2 / 12)
    assert loop.distinct_2 == pytest.approx(2 / 11)
    assert loop.repetition is not None
    assert loop.repetition > 0.7
    assert (plain.distinct_1, plain.distinct_2) == (1, 1)
    assert plain.repetition == pytest.approx(0, abs=0.2)
    assert odd.loss is not None


def test_runs_of_words_are_counted_once_each() -> None:
    assert distinct(["a", "b", "a", "b"], 1) == 0.5
    assert distinct(["a", "b", "a", "b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) is None


def test_losses_come_in_the_order_of_the_texts_where_some_are_empty(tiny: Any) -> None:
    tokens = CompletionTokens(tiny.tokenizer, [("a", ""), ("a", "bb"), ("a", "")])
    losses = completion_losses(tiny, tokens)
    assert [math.isnan(loss) for loss in losses] == [True, False, True]


@pytest.fixture
def generations() -> pl.DataFrame:
    rows = [("unsteered", 0.0), ("caa", 4.0), ("sae", 4.0)]
    names = ["generation_id", "goal", "method", "prompt", "scale", "sample"]
    return pl.DataFrame(
        [(f"{m}{i}", "london", m, "I think", s, i) for m, s in rows for i in range(2)], schema=names, orient="row"
    )


def measures(generations: pl.DataFrame, losses: list[float | None]) -> pl.DataFrame:
    others = {name: 0.5 for name in ("distinct_1", "distinct_2", "repetition")}
    loss = pl.Series("loss", losses, pl.Float64)
    return generations.select("generation_id").with_columns(
        loss, n_tokens=8, n_words=3, **{k: pl.lit(v) for k, v in others.items()}
    )


def test_the_mean_perplexity_is_that_of_the_mean_loss_and_unsteered_texts_are_scale_0_of_each_method(
    generations: pl.DataFrame,
) -> None:
    found = measure_table(generations, measures(generations, [1.0, 3.0, 2.0, None, 5.0, 5.0]))
    values = {(method, scale): value for method, scale, value in found.select("method", "scale", "perplexity").iter_rows()}
    assert values["caa", 0.0] == values["sae", 0.0] == pytest.approx(math.exp(2))
    assert values["caa", 4.0] == pytest.approx(math.exp(2))
    assert values["sae", 4.0] == pytest.approx(math.exp(5))
    assert measure_table(generations, None).is_empty()


def test_the_page_shows_each_method_at_its_scale_and_unsteered_texts(generations: pl.DataFrame) -> None:
    table = measure_table(generations, measures(generations, [1.0] * 2 + [2.0] * 4), ("goal", "method", "scale"))
    methods = pl.DataFrame({"goal": ["london"] * 2, "method": ["caa", "sae"], "scale": [4.0, 0.0]})
    page = measures_section(table, methods, {"caa": "CAA"})
    assert "| london | CAA | 4 | 7.4 | 0.50 |" in page
    assert "| london | sae | 0 | 2.7 | 0.50 |" in page
    assert "| london | unsteered | 0 | 2.7 | 0.50 |" in page
