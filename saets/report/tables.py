"""The report's tables: a title, what it says, a header, and rows that know their goal and method."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saets.plots import display_names
from saets.report.findings import Findings
from saets.scores import statistics
from saets.scores.page import figure
from saets.scores.results import FIGURES

Table = dict[str, Any]
Row = tuple[Mapping[str, Any], Sequence[str]]
"""What a row is about, with the keys goal and method where it belongs to one; its cells."""

_FORMS = dict(zip(FIGURES, (".1f", ".2f", ".2f", ".2f", ".1f", ".1f"), strict=True))
MOST_FAILURES = 200
"""Vectors that could not be measured of which the page tells, at most."""


def tables(findings: Findings) -> dict[str, Table]:
    """Every table for which the run has rows, by the name of its place in the page."""
    found = {
        "differences": _differences(findings),
        "measures": _measures(findings),
        "side-effects": _side_effects(findings),
        "strengths": _strengths(findings),
        "order": _order(findings),
        "agreement": _agreement(findings),
        "scales": _scales(findings),
        "fit": _fit(findings),
        "failed-texts": _failed_texts(findings),
        "failed-vectors": _failed_vectors(findings),
    }
    return {name: table for name, table in found.items() if table["rows"]}


def _table(title: str, note: str, header: Sequence[str], rows: Iterable[Row]) -> Table:
    """Cells are texts; those from the first one that is no name on are figures."""
    written = [
        {"goal": about.get("goal"), "method": about.get("method"), "other": about.get("other"), "cells": list(cells)}
        for about, cells in rows
    ]
    return {"title": title, "note": note, "header": list(header), "rows": written}


def _name(method: str) -> str:
    return display_names([method]).get(method, method)


def _rows(frame: pl.DataFrame | None) -> Iterator[dict[str, Any]]:
    return iter(()) if frame is None else frame.iter_rows(named=True)


def _bounds(row: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    return row[f"{name}_low"], row[f"{name}_high"]


def _differences(findings: Findings) -> Table:
    return _table(
        "Differences between methods",
        f"Held-out score of the first minus that of the second. Corrected p by Holm's method; below {statistics.LEVEL:g} counts.",
        ("goal", "pair", "difference [95% interval]", "p", "p, corrected"),
        (
            (
                row,
                (
                    row["goal"],
                    f"{_name(row['method'])} − {_name(row['other'])}",
                    figure(row["difference"], "+.3f", _bounds(row, "difference")),
                    figure(row["p"], ".2g"),
                    figure(row["p_adjusted"], ".2g"),
                ),
            )
            for row in _rows(findings.summary.comparisons)
        ),
    )


def _measures(findings: Findings) -> Table:
    rows = []
    if findings.measures is not None:
        at_scale = findings.summary.methods.select("goal", "method", "scale")
        plain = findings.measures.filter(pl.col("scale") == 0).unique("goal", maintain_order=True)
        chosen = at_scale.join(findings.measures, on=("goal", "method", "scale"), maintain_order="left")
        both = pl.concat([chosen, plain.with_columns(method=pl.lit("unsteered")).select(chosen.columns)])
        rows = list(_rows(both.sort("goal", maintain_order=True)))
    return _table(
        "Figures that need no judge",
        "Means over each method's texts at its scale, and over unsteered ones. Perplexity is the unsteered model's.",
        ("goal", "method", "scale", "perplexity", "distinct-1", "distinct-2", "repetition", "tokens", "words"),
        (
            (
                {**row, "method": None if row["method"] == "unsteered" else row["method"]},
                (
                    row["goal"],
                    _name(row["method"]),
                    f"{row['scale']:g}",
                    *(figure(row[name], form) for name, form in _FORMS.items()),
                ),
            )
            for row in rows
        ),
    )


def _side_effects(findings: Findings) -> Table:
    return _table(
        "Side effects",
        "At each method's scale. Perplexity of held-out text, steered (unsteered). Target: mean effect on the goal's features. "
        "Others: length of the effect on all other features, without what noise adds, ± the length of noise alone.",
        ("goal", "method", "scale", "perplexity", "target", "others", "largest other"),
        (
            (
                row,
                (
                    row["goal"],
                    _name(row["method"]),
                    f"{row['scale']:g}",
                    f"{row['perplexity']:.1f} ({row['unsteered_perplexity']:.1f})",
                    "–" if math.isnan(row["target"]) else f"{row['target']:+.3f}",
                    f"{row['others']:.3f} ± {row['noise']:.3f}",
                    f"{row['largest']}: {row['largest_effect']:+.3f}",
                ),
            )
            for row in _rows(findings.side_effects)
        ),
    )


def _strengths(findings: Findings) -> Table:
    return _table(
        "Battles",
        "Pairs of texts of the same prompt and sample, judged against each other in both orders. Strengths are log odds, mean 0.",
        ("goal", "method", "criterion", "strength [95% interval]", "won", "tied", "lost", "battles"),
        (
            (
                row,
                (
                    row["goal"],
                    _name(row["method"]),
                    row["criterion"],
                    figure(row["strength"], "+.2f", _bounds(row, "strength")),
                    *(figure(row[name], ".2f") for name in ("won", "tied", "lost")),
                    f"{row['n']:,}",
                ),
            )
            for row in _rows(findings.battles.strengths if findings.battles else None)
        ),
    )


def _order(findings: Findings) -> Table:
    return _table(
        "Whether the order of showing mattered",
        "0.5 is no preference for the text shown first.",
        ("goal", "criterion", "won by the first [95% interval]", "same verdict in both orders", "battles", "failed"),
        (
            (
                row,
                (
                    row["goal"],
                    row["criterion"],
                    figure(row["first"], ".2f", _bounds(row, "first")),
                    figure(row["consistent"], ".2f"),
                    f"{row['n']:,}",
                    f"{row['n_failed']:,}",
                ),
            )
            for row in _rows(findings.battles.order if findings.battles else None)
        ),
    )


def _agreement(findings: Findings) -> Table:
    return _table(
        "Agreement of judges",
        "Over the texts that both graded.",
        ("goal", "criterion", "judges", "rank correlation", "weighted kappa", "mean difference", "texts"),
        (
            (
                {"goal": row["goal"]},
                (
                    row["goal"],
                    row["criterion"],
                    f"{row['judge']}, {row['other']}",
                    figure(row["spearman"], ".2f", _bounds(row, "spearman")),
                    figure(row["kappa"], ".2f", _bounds(row, "kappa")),
                    figure(row["difference"], "+.3f"),
                    f"{row['n']:,}",
                ),
            )
            for row in _rows(findings.agreement)
        ),
    )


def _scales(findings: Findings) -> Table:
    """Between which scales each vector is of use, as its file says."""
    rows = []
    for (goal, method), facts in findings.vectors.items():
        scales = facts.get("scales", {})
        ends = f"{figure(scales.get('low'), '.3g')} to {figure(scales.get('high'), '.3g')}"
        about = {"goal": goal, "method": method}
        rows.append((about, (goal, _name(method), ends, str(scales.get("outcome", "–")), str(facts.get("id", "–")))))
    return _table(
        "Vectors",
        "Between which scales a vector is of use, by the model's loss, and the id of its direction.",
        ("goal", "method", "scales", "calibration", "vector"),
        rows,
    )


def _fit(findings: Findings) -> Table:
    fit = findings.fit or {}
    held_out = fit.get("held_out") or {}
    features = held_out.get("feature_r2") or {}
    quartiles = [features.get(name) for name in ("lower_quartile", "median", "upper_quartile")]
    rows = [
        ("R2 of held-out rows", figure(held_out.get("r2"))),
        ("R2 that the measurement's noise allows", figure(held_out.get("r2_ceiling"))),
        ("noise's share of the squared error", figure(held_out.get("noise_share"), ".1%")),
        ("cosine of predicted and measured effects", figure(held_out.get("cosine"))),
        ("cosine of the mean effect alone", figure(held_out.get("cosine_mean_effect"))),
        ("R2 of features: quartiles", " · ".join(figure(one) for one in quartiles)),
        ("features with R2 above 0.5", figure(features.get("share_above_half"), ".1%")),
        ("rows fitted, held out", f"{fit.get('rows_train', 0):,}, {fit.get('rows_held_out', 0):,}"),
        ("rows measured here, shipped", f"{fit.get('rows_own', 0):,}, {fit.get('rows_shipped', 0):,}"),
        ("rows capped, failed", f"{fit.get('rows_capped', 0):,}, {fit.get('rows_failed', 0):,}"),
        ("solver, penalty", f"{fit.get('solver', '–')}, {figure(fit.get('penalty'), '.3g')}"),
    ]
    return _table(
        "The fit in figures",
        "Of the linear map from vectors to effects, on vectors that it was not fitted to.",
        ("figure", "value"),
        (({}, row) for row in (rows if held_out else ())),
    )


def _failed_texts(findings: Findings) -> Table:
    """Reasons why texts have no score, the most frequent first."""
    failed = findings.texts.filter("failed").select("goal", "method", "prompt", "scale", "sample")
    keys = findings.generations.join(failed, on=failed.columns, how="semi").select("generation_id", "goal", "method")
    errors = findings.grades.filter(pl.col("error").is_not_null()).unique("generation_id", maintain_order=True)
    reasons = keys.join(errors.select("generation_id", "error"), on="generation_id", how="left")
    counted = reasons.with_columns(pl.col("error").fill_null("not graded yet")).group_by("goal", "method", "error").len()
    return _table(
        "Texts without a score",
        "They count in no figure above. `saets grade --retry-failed` asks again.",
        ("goal", "method", "reason", "texts"),
        (
            (row, (row["goal"], _name(row["method"]), row["error"], f"{row['len']:,}"))
            for row in _rows(counted.sort("goal", "len", "method", "error", descending=[False, True, False, False]))
        ),
    )


def _failed_vectors(findings: Findings) -> Table:
    failures = findings.failures
    there = 0 if failures is None else len(failures)
    more = f" {MOST_FAILURES} of {there:,} are shown." if there > MOST_FAILURES else ""
    return _table(
        "Vectors that could not be measured",
        f"`saets effects --retry-failed` tries them again.{more}",
        ("vector", "source", "row", "reason"),
        (
            ({}, (row["vector_id"], row["source"], "–" if row["index"] is None else f"{row['index']}", row["reason"]))
            for row in _rows(None if failures is None else failures.head(MOST_FAILURES))
        ),
    )
