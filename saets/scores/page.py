"""results.md: what the evaluation found, one section a table, each from the frame that its name says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from saets.scores import statistics
from saets.scores.battles import BattleTables
from saets.scores.results import FIGURES
from saets.scores.summary import Summary

Names = Mapping[str, str]
"""Display names of methods, in the order of columns and rows."""

MARKS = {"winner": "**{}**", "tie": "{} ="}
"""How a cell shows where its method stands."""


def scores_section(summary: Summary, names: Names) -> str:
    """Goals by methods: held-out score and interval, winners and ties marked; then how sure the differences are."""
    methods, overall, comparisons = summary
    rows = pl.concat([methods, overall])
    lines = [
        "# Results",
        "",
        "Mean behaviour x mean coherence, the scale chosen on one half of the samples and scored on the other.",
    ]
    lines += ["", score_table(rows, names).rstrip("\n"), "", _legend(comparisons, int(rows["seed"][0]))]
    lines += ["", "## Optimistic maximum", "", OPTIMISTIC, "", _maxima(rows, names)]
    shown = comparisons.filter(pl.col("goal").is_in(overall["goal"].unique().implode())) if len(overall) else comparisons
    if len(shown):
        lines += ["", "## Differences", "", _differences(shown, names)]
    return "\n".join(lines) + "\n"


def measures_section(measures: pl.DataFrame, methods: pl.DataFrame, names: Names) -> str:
    """Figures that need no judge, of each method's texts at its scale and of unsteered ones.

    `measures` is a `measure_table` by goal, method and scale, `methods` a `summary_table`.
    """
    at_scale = methods.select("goal", "method", "scale").join(measures, on=("goal", "method", "scale"))
    plain = measures.filter(pl.col("scale") == 0).unique("goal", maintain_order=True).with_columns(method=pl.lit("unsteered"))
    rows = pl.concat([at_scale, plain.select(at_scale.columns)]).sort("goal", maintain_order=True)
    forms = dict(zip(FIGURES, (".1f", ".2f", ".2f", ".2f", ".1f", ".1f"), strict=True))
    cells = [
        [
            row["goal"],
            names.get(row["method"], row["method"]),
            f"{row['scale']:g}",
            *(figure(row[name], forms[name]) for name in forms),
        ]
        for row in rows.iter_rows(named=True)
    ]
    header = ["goal", "method", "scale", "perplexity", "distinct-1", "distinct-2", "repetition", "tokens", "words"]
    what = "Perplexity is the unsteered model's, given the prompt."
    return f"## Texts at each method's scale\n\n{what}\n\n{table(header, cells)}"


def side_effects_section(side_effects: pl.DataFrame, names: Names) -> str:
    """What steering at each method's scale does besides; `side_effects` as in side_effects.parquet."""
    rows = [
        [
            row["goal"],
            names.get(row["method"], row["method"]),
            f"{row['scale']:g}",
            f"{row['perplexity']:.1f} ({row['unsteered_perplexity']:.1f})",
            "–" if math.isnan(row["target"]) else f"{row['target']:+.3f}",
            f"{row['others']:.3f} ± {row['noise']:.3f}",
            f"{row['largest']}: {row['largest_effect']:+.3f}",
        ]
        for row in side_effects.iter_rows(named=True)
    ]
    what = (
        f"Steered at {side_effects['positions'][0]}. Perplexity of held-out text (unsteered). Target: mean effect on the goal's "
        "features. Others: length of the effect on all other features, without what noise adds, ± the length of noise alone."
    )
    header = ["goal", "method", "scale", "perplexity", "target", "others", "largest other"]
    return f"## Side effects\n\n{what}\n\n{table(header, rows)}"


def battles_section(battles: BattleTables, names: Names) -> str:
    """Strengths of the methods in pairwise battles, and whether the order of showing mattered."""
    strengths = [
        [
            row["goal"],
            row["criterion"],
            names.get(row["method"], row["method"]),
            figure(row["strength"], "+.2f", (row["strength_low"], row["strength_high"])),
            *(figure(row[name], ".2f") for name in ("won", "tied", "lost")),
            f"{row['n']:,}",
        ]
        for row in battles.strengths.iter_rows(named=True)
    ]
    order = [
        [
            row["goal"],
            row["criterion"],
            figure(row["first"], ".2f", (row["first_low"], row["first_high"])),
            figure(row["consistent"], ".2f"),
            f"{row['n']:,}",
            f"{row['n_failed']:,}",
        ]
        for row in battles.order.iter_rows(named=True)
    ]
    judge = battles.order["judge"][0]
    note = " It compares its own scores: a proxy, without any effect of order." if judge.startswith("local:") else ""
    what = f"Pairs of texts of the same prompt and sample, shown in both orders to {judge}.{note} Strengths are log odds, mean 0."
    header = ["goal", "criterion", "method", "strength", "won", "tied", "lost", "battles"]
    bias = ["goal", "criterion", "share won by the text shown first", "same verdict in both orders", "battles", "failed"]
    return f"## Battles\n\n{what}\n\n{table(header, strengths)}\n{table(bias, order)}"


def agreement_section(agreement: pl.DataFrame) -> str:
    """How far the judges agree; `agreement` is an `agreement_table`."""
    rows = [
        [
            row["goal"],
            row["criterion"],
            f"{row['judge']}, {row['other']}",
            figure(row["spearman"], ".2f", (row["spearman_low"], row["spearman_high"])),
            figure(row["kappa"], ".2f", (row["kappa_low"], row["kappa_high"])),
            figure(row["difference"], "+.3f"),
            f"{row['n']:,}",
        ]
        for row in agreement.iter_rows(named=True)
    ]
    header = ["goal", "criterion", "judges", "rank correlation", "weighted kappa", "mean difference", "texts"]
    return f"## Agreement of judges\n\n{table(header, rows)}"


OPTIMISTIC = (
    "The largest score over all scales, on the texts that chose it: the paper's figure, the more too high the fewer samples and "
    "the more scales there are."
)


def _maxima(rows: pl.DataFrame, names: Names) -> str:
    """Goals by methods: the largest score over the scales, and at which."""
    methods = _ordered(set(rows["method"]), names)
    lines = []
    for (goal,), group in rows.group_by("goal", maintain_order=True):
        cells = {row["method"]: _maximum_cell(row) for row in group.iter_rows(named=True)}
        lines.append([str(goal), *(cells.get(method, "–") for method in methods)])
    return table(["goal", *(names.get(method, method) for method in methods)], lines).rstrip("\n")


def _maximum_cell(row: Mapping[str, Any]) -> str:
    at = "" if row["scale"] is None else f" at {row['scale']:g}"
    return figure(row["optimistic_max"]) + at


def score_table(rows: pl.DataFrame, names: Names | None = None) -> str:
    """Markdown table of a `summary_table`, goals by methods: held-out score [95% interval], marked as in `MARKS`.

    Where there is no held-out score the cell gives the optimistic maximum and says so; a dash stands for no grades.
    """
    names = names or {}
    methods = _ordered(set(rows["method"]), names)
    lines = []
    for (goal,), group in rows.group_by("goal", maintain_order=True):
        cells = {row["method"]: _score_cell(row) for row in group.iter_rows(named=True)}
        lines.append([str(goal), *(cells.get(method, "–") for method in methods)])
    return table(["goal", *(names.get(method, method) for method in methods)], lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells lose their line breaks, and bars in them do not end them."""
    return "".join(f"{_line(cells)}\n" for cells in (header, ["---"] * len(header), *rows))


def figure(value: float | None, form: str = ".3f", bounds: tuple[float | None, float | None] = (None, None)) -> str:
    """A number, its interval in brackets where there is one; a dash for none."""
    if value is None:
        return "–"
    low, high = bounds
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def _legend(comparisons: pl.DataFrame, seed: int) -> str:
    intervals = f"Brackets: 95% intervals from {statistics.RESAMPLES:,} resamples of the samples, seed {seed}."
    tests = comparisons["p_adjusted"].drop_nulls().len()
    if not tests:
        return intervals
    return (
        "Bold: above every other method of its goal. =: not told apart from the best. A difference counts below p = "
        f"{statistics.LEVEL:g}, by a paired test over the same prompts and samples ({statistics.FLIPS:,} random swaps) with "
        f"Holm's correction. {intervals}"
    )


def _differences(comparisons: pl.DataFrame, names: Names) -> str:
    rows = [
        [
            row["goal"],
            f"{names.get(row['method'], row['method'])} − {names.get(row['other'], row['other'])}",
            figure(row["difference"], "+.3f", (row["difference_low"], row["difference_high"])),
            figure(row["p"], ".2g"),
            figure(row["p_adjusted"], ".2g"),
        ]
        for row in comparisons.iter_rows(named=True)
    ]
    return table(["goal", "pair", "difference", "p", "p, corrected"], rows).rstrip("\n")


def _ordered(methods: set[str], names: Names) -> list[str]:
    return [method for method in names if method in methods] + sorted(methods - set(names))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", r"\|") for cell in cells) + " |"


def _score_cell(row: Mapping[str, Any]) -> str:
    if row["held_out"] is None:
        return "–" if row["optimistic_max"] is None else f"max {row['optimistic_max']:.3f}, not held out"
    return MARKS.get(row["standing"], "{}").format(figure(row["held_out"], bounds=(row["held_out_low"], row["held_out_high"])))
