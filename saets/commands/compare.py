"""The command that has methods fight each other in pairs, and what it shows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from saets.commands.common import Commands, add_command, add_max_cost, console, session_of, show_path
from saets.errors import InputError
from saets.records import CRITERIA, Criterion

if TYPE_CHECKING:
    from saets.scores.battles import BattleTables


def add(commands: Commands) -> None:
    """Put this command into the parser."""
    compare = add_command(commands, "compare", _compare, "compare methods by pairs of graded texts, shown in both orders")
    compare.add_argument("--methods", nargs="+", metavar="METHOD", help="two or more; by default all of the experiment")
    compare.add_argument("--criterion", choices=(*CRITERIA, "both"), default="both")
    compare.add_argument("--samples", type=int, metavar="N", help="only the first N samples of each prompt")
    compare.add_argument("--retry-failed", action="store_true", help="ask again about pairs on which the judge failed")
    add_max_cost(compare)


def _compare(options: argparse.Namespace) -> None:
    from saets.stages.asking import Asking
    from saets.stages.compare import Wanted, compare

    if options.samples is not None and options.samples < 1:
        raise InputError(f"--samples is {options.samples}; expected 1 or more")
    criteria: tuple[Criterion, ...] = CRITERIA if options.criterion == "both" else (options.criterion,)
    with session_of(options, goals=True, judge=True) as session:
        wanted = Wanted(options.methods, criteria, options.samples)
        tables = compare(session, wanted, Asking(options.max_cost, options.retry_failed))
        _show(tables, local=session.experiment.judge.kind == "local")
        show_path("battles", session.run.path / "battles.parquet")


def _show(tables: BattleTables, *, local: bool) -> None:
    from saets.plots.looks import display_names

    names = display_names(tables.strengths["method"])
    shown = Table("goal", "criterion", "method", "strength", "95% interval", "won", "tied", box=None, pad_edge=False)
    for row in tables.strengths.iter_rows(named=True):
        low, high = row["strength_low"], row["strength_high"]
        shown.add_row(
            escape(row["goal"]),
            row["criterion"],
            names.get(row["method"], row["method"]),
            f"{row['strength']:+.2f}",
            "-" if low is None else f"{low:+.2f} to {high:+.2f}",
            f"{row['won']:.2f}",
            f"{row['tied']:.2f}",
        )
    console.print("\nStrength: log odds in battles of two texts, mean 0.")
    console.print(shown)
    if local:
        console.print("The local judge compares its own scores: a proxy, the same in both orders.")
        return
    for row in tables.order.iter_rows(named=True):
        first = row["first"]
        share = "no battle was decided" if first is None else f"{first:.0%} of decided battles won by the text shown first"
        failed = f", {row['n_failed']} failed" if row["n_failed"] else ""
        console.print(f"{row['goal']}, {row['criterion']}: {share} (50% is fair); {row['n']} battles{failed}", markup=False)
