"""The command that finds features for a goal and shows what they fire on and do; it writes nothing into a run folder."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from saets.commands.common import Commands, add_command, console, errors, opened_run
from saets.errors import InputError
from saets.files.storage import locate
from saets.terminal.display import shown_progress

if TYPE_CHECKING:
    import polars as pl

    from saets.experiment.goal import Goal
    from saets.features.finder import Search

FIRES = ">>", "<<"
"""Around the token on which a feature fires; it is also set in bold."""

NUMBERS = {
    "feature": ("feature", "d"),
    "contrast": ("contrast", "+.2f"),
    "standard_error": ("s.e.", ".2f"),
    "wins": ("pairs", ".0%"),
    "density": ("density", ".4f"),
    "output": ("output", "+.4f"),
    "measured": ("measured", "+.2f"),
    "predicted": ("predicted", "+.2f"),
}
"""Columns of the table, by the frame's; one that is empty is left out."""

SUFFIXES = (".parquet", ".csv")


def add(commands: Commands) -> None:
    """Put this command into the parser."""
    features = add_command(commands, "features", _features, "find features of the SAE for a goal, or show chosen ones")
    features.add_argument("--goal", help="a goal's id or file")
    features.add_argument("--feature", type=int, action="append", default=[], metavar="ID", help="show this one; repeatable")
    features.add_argument("--top", type=int, default=10, help="features to show")
    features.add_argument("--sort", default="contrast", metavar="ORDER", help="contrast (the default), output, effect, or all")
    features.add_argument(
        "--max-density", type=float, default=0.05, metavar="SHARE", help="leave out what fires on more of all tokens (0.05)"
    )
    features.add_argument(
        "--skip-positions", type=int, default=2, metavar="N", help="first tokens that do not count, BOS among them (2)"
    )
    features.add_argument("--corpus", metavar="FILE", help="text for densities and contexts, one passage a line")
    features.add_argument("--save", metavar="FILE", help="also write all columns, as .parquet or .csv")


def _features(options: argparse.Namespace) -> None:
    from saets.experiment.goal import load_goal
    from saets.features.contrast import contrast_texts
    from saets.features.finder import FeatureFinder
    from saets.model import load_tokenizer
    from saets.sae import check_features, sae_width

    if bool(options.goal) == bool(options.feature):
        raise InputError("choose --goal GOAL, or --feature ID (repeatable)")
    if options.save and not options.save.endswith(SUFFIXES):
        raise InputError(f"--save {options.save}: expected a name that ends in .parquet or .csv")
    goal = load_goal(options.goal) if options.goal else None
    search = _search(options)
    run = opened_run(options)
    check_features(options.feature, sae_width(run.experiment.sae))
    if goal:
        contrast_texts(load_tokenizer(run.experiment.model), goal, search.skip_positions)
    with shown_progress(errors, options.progress) as progress:
        finder = FeatureFinder(run.experiment, run.model, run.folder, search=search, goal=goal, progress=progress)
        found = finder.for_goal(goal) if goal else finder.describe(options.feature)
    if options.save:
        locate(options.save).write_bytes(_file(found, options.save))
    console.print(_table(found))
    for row in found.iter_rows(named=True):
        console.print()
        for line in _card(row):
            console.print(line)
    console.print()
    console.print(Text(f"Densities and contexts: {finder.cards.source}. {_effects(found, finder.known.predicted_by)}"))
    console.print(Text(f"To steer by one: saets run {options.experiment}{_settings(options.goal, goal, found['feature'][0])}"))


def _settings(named: str | None, goal: Goal | None, feature: int) -> str:
    """Options that make a feature the goal's target; a goal may be named by its file."""
    goals = f" --set 'steering.goals=[\"{named}\"]'" if goal else ""
    return f"{goals} --set 'steering.features.{goal.id if goal else 'GOAL'}=[[{feature}, 1.0]]'"


def _search(options: argparse.Namespace) -> Search:
    from saets.features.cards import corpus_file
    from saets.features.finder import Search

    corpus = corpus_file(Path(options.corpus)) if options.corpus else None
    return Search(options.top, options.sort, options.max_density, options.skip_positions, corpus)


def _table(found: pl.DataFrame) -> Table:
    shown = {name: style for name, style in NUMBERS.items() if found[name].null_count() < len(found)}
    table = Table(box=None, pad_edge=False)
    for title, _ in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.iter_rows(named=True):
        table.add_row(*("" if row[name] is None else format(row[name], spec) for name, (_, spec) in shown.items()))
    return table


def _card(row: dict[str, Any]) -> Iterator[Text]:
    """The lines below the table for one feature; texts of the model are never read as markup."""
    yield Text(f"{row['feature']}", style="bold").append(f"  {row['link']}" if row["link"] else "", style="not bold")
    yield _label("own top tokens").append(_tokens(row["own_tokens"]))
    yield _label("boosting raises").append(_tokens(row["raised_tokens"]))
    for kind in ("measured", "predicted"):
        if row[f"{kind}_others"] is not None:
            moved = ", ".join(f"{one['feature']} {one['effect']:+.2f}" for one in row[f"{kind}_others"])
            yield _label(f"also moves ({kind})").append(moved)
    for context in row["contexts"]:
        yield _context(context)
    if not row["contexts"]:
        yield Text("  fires nowhere in this text")


def _label(text: str) -> Text:
    return Text(f"  {text:<24}")


def _context(context: dict[str, Any]) -> Text:
    """One line; white space before the token stays outside its marks."""
    token, (opened, closed) = context["token"], FIRES
    space = token[: len(token) - len(token.lstrip(" "))] if token.strip(" ") else ""
    line = Text(f"  {context['activation']:7.1f}  {_one_line(context['before'] + space)}")
    line.append(opened + _one_line(token[len(space) :]) + closed, style="bold")
    return line.append(_one_line(context["after"]))


def _tokens(tokens: list[str]) -> str:
    return " ".join(map(repr, tokens))


def _one_line(text: str) -> str:
    """Line breaks as `\\n`, and nothing that a terminal would obey."""
    return "".join(one if one.isprintable() else "\\n" if one == "\n" else " " for one in text)


def _effects(found: pl.DataFrame, predicted_by: str) -> str:
    """What the effect columns are, where there are any."""
    kinds = {"measured": "measured: its decoder row", "predicted": f"predicted: SAE-TS for it alone, by {predicted_by}"}
    there = [text for name, text in kinds.items() if found[f"{name}_others"].null_count() < len(found)]
    return f"Effect on the feature itself: {'; '.join(there) or 'not known for any of these'}."


def _file(found: pl.DataFrame, name: str) -> bytes:
    """The frame as a file; in CSV, lists are JSON."""
    import polars as pl

    content = io.BytesIO()
    if name.endswith(".parquet"):
        found.write_parquet(content)
    else:
        nested = [column for column in found.columns if found[column].dtype == pl.List]
        plain = [pl.Series(column, [json.dumps(one, ensure_ascii=False) for one in found[column].to_list()]) for column in nested]
        found.with_columns(plain).write_csv(content)
    return content.getvalue()
