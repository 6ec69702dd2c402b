"""The scores that the paper reports for its two models."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from saets.scores.summary import ALL_GOALS


def paper_scores(model: str, hook_name: str, goals: Sequence[str] = ()) -> pl.DataFrame | None:
    """goal, method, score: the paper's largest product over scales (its tables for 2B and 9B); None for any other model or hook.

    Of the `goals`, by default all nine. Where the paper has each of them, rows of `ALL_GOALS` hold each method's mean.

    >>> paper_scores("google/gemma-2-2b", "blocks.12.hook_resid_post", ["london"])["score"].max()
    0.538
    """
    known = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8")).get(model)
    if known is None or known["hook_name"] != hook_name:
        return None
    scores = [
        {"goal": goal, "method": method, "score": score}
        for goal, of_methods in known["scores"].items()
        if not goals or goal in goals
        for method, score in zip(known["methods"], of_methods, strict=True)
    ]
    table = pl.DataFrame(scores, schema={"goal": pl.String, "method": pl.String, "score": pl.Float64})
    if not set(goals) <= known["scores"].keys():
        return table
    mean = table.group_by("method", maintain_order=True).agg(pl.col("score").mean())
    return pl.concat([table, mean.select(pl.lit(ALL_GOALS).alias("goal"), "method", "score")])
