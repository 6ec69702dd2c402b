"""The paper's scores."""

from __future__ import annotations

import pytest

from saets.plots import METHODS, paper_scores
from saets.scores.summary import ALL_GOALS

HOOK = "blocks.12.hook_resid_post"


@pytest.mark.parametrize(
    ("model", "means"),
    [
        ("google/gemma-2-2b", {"caa": 0.2165, "sae": 0.1290, "sae_ts": 0.3600, "pinverse_raw": 0.1197, "rotation": 0.3115}),
        ("google/gemma-2-9b", {"caa": 0.2531, "sae": 0.2184, "sae_ts": 0.3376}),
    ],
)
def test_the_means_over_goals_are_those_that_the_paper_states(model: str, means: dict[str, float]) -> None:
    table = paper_scores(model, HOOK)
    assert table is not None
    assert len(table) == 10 * len(means)
    assert set(table["method"]) == means.keys() <= METHODS.keys()
    found = dict(table.filter(table["goal"] == ALL_GOALS).select("method", "score").iter_rows())
    assert found == {method: pytest.approx(mean, abs=6e-5) for method, mean in means.items()}


def test_the_mean_is_over_the_goals_of_the_run_where_the_paper_has_each() -> None:
    two = paper_scores("google/gemma-2-9b", HOOK, ["london", "wedding"])
    assert two is not None
    means = dict(two.filter(two["goal"] == ALL_GOALS).select("method", "score").iter_rows())
    assert means == {"caa": pytest.approx(0.1436), "sae": pytest.approx(0.19845), "sae_ts": pytest.approx(0.43145)}
    more = paper_scores("google/gemma-2-9b", HOOK, ["london", "mine"])
    assert more is not None
    assert set(more["goal"]) == {"london"}


def test_another_model_or_hook_has_none() -> None:
    assert paper_scores("openai-community/gpt2", HOOK) is None
    assert paper_scores("google/gemma-2-2b", "blocks.13.hook_resid_post") is None
