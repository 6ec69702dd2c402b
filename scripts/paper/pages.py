"""The study as Markdown: the report's table, what was tried, facts for its reading, and the paper's own table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from paper.carrying_out import ALIKE
from paper.study import Chosen, Part, Study
from saets.plots import display_names
from saets.plots.paper import paper_scores
from saets.scores.page import figure, score_table, scores_section, table
from saets.scores.summary import Summary

PAPER_MODELS = {"2B": "google/gemma-2-2b", "9B": "google/gemma-2-9b"}
PAPER_HOOK = "blocks.12.hook_resid_post"


def names_of(methods: Iterable[str]) -> dict[str, str]:
    """Display names, those of settings with all features held still alike among them."""
    methods = list(methods)
    known = display_names(method.removesuffix(ALIKE) for method in methods)
    return known | {method: known[method.removesuffix(ALIKE)] + ALIKE for method in methods if method.endswith(ALIKE)}


def tried_section(study: Study, tried: pl.DataFrame, chosen: Chosen) -> str:
    """Every setting tried, and which was chosen; `tried` is the overall part of a `Summary`."""
    names, scores = names_of(tried["method"]), {row["method"]: row for row in tried.iter_rows(named=True)}
    alike = ALIKE if chosen.stillness == "equal" else ""
    taken = {method + (alike if family == "constrained" else "") for family, method in chosen.methods.items()}
    listed = [
        *(method for _, methods in study.tried for method in methods),
        *(method + ALIKE for method in study.alike),
    ]
    lines = []
    for method in listed:
        row = scores.get(method, {})
        bounds = (row.get("held_out_low"), row.get("held_out_high"))
        lines.append([names[method], figure(row.get("held_out"), bounds=bounds), "chosen" if method in taken else ""])
    scales, reported = (", ".join(f"{scale:g}" for scale in each) for each in (chosen.tuning_scales, chosen.scales))
    what = (
        f"Held-out score, mean of {', '.join(study.development)}; {study.tuning_samples} samples a scale. Scales, in units of "
        f"the residual stream's median length: {scales}; those of the report: {reported}."
    )
    return f"## Settings tried\n\n{what}\n\n{table(['setting', 'score', ''], lines)}"


def report_section(summary: Summary) -> str:
    """The report's table, of the goals that have features."""
    return scores_section(summary, names_of(summary.methods["method"]))


def contrast_section(summary: Summary) -> str:
    """Scores of the goals that no feature is about, by the methods that need none."""
    what = "No feature of the SAE is about these, so methods that steer towards given features are left out. Tests are their own."
    return f"## Goals without a feature\n\n{what}\n\n{score_table(summary.methods, names_of(summary.methods['method']))}"


def reading_section(facts: pl.DataFrame) -> str:
    """Facts behind the table; see `paper.reading.TABLE`."""
    names = names_of(facts["method"])
    goals = facts.unique("goal", maintain_order=True).drop_nulls("column_and_row")
    of_goals = [
        [row["goal"], *(figure(row[name]) for name in ("column_and_row", "column_and_bias", "decoder_gain"))]
        for row in goals.iter_rows(named=True)
    ]
    of_methods = [
        [
            row["goal"],
            names[row["method"]],
            *(figure(row[name]) for name in ("gain", "cost")),
            *(figure(row[name], ".2f") for name in ("calibrated", "scale")),
            *(_with_error(row, name) for name in ("behaviour", "coherence", "lost")),
            figure(row["measured_target"], "+.3f"),
            _plus_minus(row["measured_others"], row["noise"]),
        ]
        for row in facts.iter_rows(named=True)
    ]
    header = ["goal", "method", "gain", "cost", "calibrated", "scale", "behaviour", "coherence", "lost", "target", "others"]
    what = (
        "Of goals: cosine of M t with the decoder rows and with M b, predicted gain of the decoder rows. Of methods: predicted "
        "gain and side-effect cost of the unit vector; calibrated and chosen scale in units of the residual stream's median "
        "length; means at the chosen scale and coherence lost for each such unit, ± standard error; measured effect on the "
        "target and on all others, ± what noise alone adds."
    )
    first = table(["goal", "M t and rows", "M t and M b", "gain of the rows"], of_goals)
    return f"## Facts behind the table\n\n{what}\n\n{first}\n{table(header, of_methods)}"


def paper_section() -> str:
    """The paper's own table, on Gemma 2."""
    names, columns = display_names(), []
    cells: dict[str, list[str]] = {}
    for size, model in PAPER_MODELS.items():
        found = paper_scores(model, PAPER_HOOK)
        assert found is not None
        columns += [f"{size}: {names[method]}" for method in found["method"].unique(maintain_order=True)]
        for goal, score in found.select("goal", "score").iter_rows():
            cells.setdefault(goal, []).append(figure(score))
    what = (
        "arXiv 2411.02193v2, Gemma 2 2B and 9B, graded by gpt-4o-mini: the best scale's score on the texts that chose it, so "
        "comparable with optimistic maxima and not with held-out scores; another model, judge and wording."
    )
    return f"## The paper's table\n\n{what}\n\n{table(['goal', *columns], [[goal, *row] for goal, row in cells.items()])}"


def plan_section(rows: Sequence[tuple[Part, int, int]], scales: int, seconds: Mapping[str, float], actors: int) -> str:
    """How many texts each part has and how many are there, and how long the others take; `rows`: part, texts, there."""
    lines = [
        [
            part.name,
            str(len(part.goals)),
            str(len(part.methods)),
            str(len(part.prompts)),
            str(part.samples),
            f"{texts:,}",
            f"{there:,}",
        ]
        for part, texts, there in rows
    ]
    total, missing = sum(texts for _, texts, _ in rows), sum(max(0, texts - there) for _, texts, there in rows)
    lines.append(["all", "", "", "", "", f"{total:,}", f"{sum(there for *_, there in rows):,}"])
    each = sum(seconds.values())
    parts = ", ".join(f"{name} {value:.4f}" for name, value in seconds.items())
    what = (
        f"{scales} scales and unsteered text. {missing:,} texts to go at {each:.4f} s a text and actor ({parts}), {actors} "
        f"actors: {missing * each / actors / 3600:.1f} hours, and some minutes for effects, vectors and side effects."
    )
    header = ["part", "goals", "methods", "prompts", "samples", "texts", "there"]
    return f"# Plan\n\n{what}\n\n{table(header, lines)}"


def _with_error(row: Mapping[str, float | None], name: str) -> str:
    return _plus_minus(row[name], row[f"{name}_se"])


def _plus_minus(value: float | None, error: float | None) -> str:
    return figure(value) if error is None else f"{figure(value)} ± {error:.3f}"
