"""Everything that the report's page shows, as plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl
from polars import selectors

from saets.experiment.config import Experiment
from saets.files.storage import shareable
from saets.plots.looks import method_looks
from saets.records import CRITERIA, UNSTEERED
from saets.report.charts import charts, panels
from saets.report.findings import Findings
from saets.report.tables import tables
from saets.sae import describe_sae
from saets.scores.results import MEASURES
from saets.scores.summary import ALL_GOALS

MOST_TEXTS = 20_000
"""Texts in a page, at most; it opens in two seconds with them."""

_SCORES = ("goal", "method", "scale", "held_out", "held_out_low", "held_out_high", "optimistic_max", "n", "n_failed", "standing")
_BOUNDS = tuple(f"{measure}_{end}" for measure in MEASURES for end in ("low", "high"))
_SCALES = ("goal", "method", "prompt", "scale", "chosen", *MEASURES, *_BOUNDS, "n", "n_failed")
_TEXTS = ("goal", "method", "prompt", "scale", "sample", *MEASURES)

Contents = dict[str, Any]


def contents(findings: Findings) -> Contents:
    """What the page is told."""
    experiment, summary = findings.experiment, findings.summary
    shown = Experiment.model_validate(shareable(experiment.model_dump(mode="json", exclude_none=True)))
    scores = pl.concat([summary.methods, summary.overall])
    looks = method_looks(scores["method"])
    methods = [method for method in looks if method in set(scores["method"])]
    texts = _chosen_texts(findings)
    return {
        "name": experiment.name,
        "description": experiment.description,
        "facts": _facts(shown, findings),
        "goals": [{"id": goal.id, "behaviour": goal.behaviour} for goal in findings.goals],
        "all_goals": ALL_GOALS,
        "methods": [{"id": name, "name": looks[name].name, "colour": looks[name].colour} for name in (*methods, UNSTEERED)],
        "scores": scores.select(_SCORES).with_columns(selectors.float().fill_nan(None)).to_dicts(),
        "scales": {name: _short(findings.results[name]) for name in _SCALES},
        "texts": {name: _short(texts[name]) for name in texts.columns},
        "texts_in_all": len(findings.texts),
        "panels": panels(findings.results),
        "charts": charts(findings),
        "tables": tables(findings),
        "settings": shown.to_toml(),
        "provenance": list(_flat(shareable(dict(findings.manifest)))),
    }


def _facts(experiment: Experiment, findings: Findings) -> list[tuple[str, str]]:
    """What the run is, in a line each."""
    evaluation, judge = experiment.evaluation, sorted(set(findings.grades["judge"]))
    held_out = (findings.fit or {}).get("held_out") or {}
    prompts = len(evaluation.prompts)
    facts = [
        ("Model", experiment.model.name),
        ("SAE", describe_sae(experiment.sae)),
        ("Steered at", experiment.hook_name),
        ("Judge", ", ".join(judge) or "none"),
        ("Texts", f"{len(findings.texts):,}, {int(findings.texts['failed'].sum()):,} without a score"),
        (
            "At each scale",
            f"{evaluation.samples} samples of {evaluation.new_tokens} tokens, {prompts} prompt{'s' if prompts > 1 else ''}",
        ),
    ]
    if held_out.get("r2") is not None:
        facts.append(("Effects predicted", f"R² {held_out['r2']:.3f} on held-out vectors"))
    return facts


def _chosen_texts(findings: Findings) -> pl.DataFrame:
    """A row a text with its grades and replies; where there are too many, the first samples of each goal, method and scale."""
    cells = findings.texts.select("goal", "method", "prompt", "scale").unique()
    most = max(1, MOST_TEXTS // max(1, len(cells)))
    rank = pl.col("sample").rank("ordinal").over("goal", "method", "prompt", "scale")
    texts = findings.texts.filter(rank <= most).select(*_TEXTS)
    keys = ("goal", "method", "prompt", "scale", "sample")
    texts = texts.join(findings.generations.select(*keys, "generation_id", "completion"), on=keys, maintain_order="left")
    for criterion in CRITERIA:
        graded = findings.grades.filter(pl.col("criterion") == criterion)
        said = pl.coalesce(pl.format("failed: {}", "error"), "reply").alias(f"{criterion}_reply")
        texts = texts.join(graded.select("generation_id", said), on="generation_id", how="left", maintain_order="left")
    return texts.drop("generation_id")


def _short(values: pl.Series) -> Any:
    """The values, numbers to four decimals; texts that repeat as a list of them and the place of each in it."""
    if values.dtype.is_float():
        return values.fill_nan(None).round(4).to_list()
    if values.dtype != pl.String or values.n_unique() > 1000:
        return values.to_list()
    known = values.unique(maintain_order=True)
    places = values.replace_strict(known, list(range(len(known))), return_dtype=pl.Int64)
    return {"of": known.to_list(), "at": places.to_list()}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys with dots between, and values as text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else str(value)
