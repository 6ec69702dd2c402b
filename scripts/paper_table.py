"""The paper's table on a model that anyone can run: nine goals, all methods, settings chosen on other goals.

    python scripts/paper_table.py [tune] [report] [show] [--plan] [--work build/paper_table]

`tune` grades every setting of `scripts/paper/study.py` on development goals and another prompt, and chooses; `report` writes and
grades the texts of the nine goals once, with what was chosen; `show` writes the tables, prints them, and draws them. Without a
name: all three. Each goes on where it was stopped, in run folders that every `saets` command can read. `--plan` says how many
texts there are and how long they take, by a rate that it measures in this process or is given (`--rate`, seconds of an actor).
`--quick` does all of it with random weights in a minute or two: it shows that everything works and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import polars as pl
from paper import pages
from paper.carrying_out import Workplace, seconds_a_text
from paper.reading import TABLE, reading
from paper.study import FULL, QUICK, Chosen, Study

from saets import plots
from saets.errors import InputError
from saets.scores.results import results_table
from saets.scores.summary import summarise
from saets.stages.results import read_outcome
from saets.stages.scales import residual_length

STEPS = ("tune", "report", "show")


def show(place: Workplace) -> str:
    """Tables of the finished report and of the tuning; also written to the work folder, with charts."""
    study, choice = place.study, place.chosen()
    parts = study.report(choice)
    texts, facts = [], []
    for part in parts:
        with place.opened(part, choice.scales) as session:
            outcome = read_outcome(session)
            texts.append(outcome.texts)
            chosen = {
                (goal, method): scale for goal, method, scale in outcome.summary.select("goal", "method", "scale").iter_rows()
            }
            facts.append(reading(session, outcome.texts, chosen, residual_length(session)))
    summaries, found = [summarise(some) for some in texts], pl.concat(facts).cast(TABLE)
    page = "\n".join(
        [
            pages.report_section(summaries[0]),
            *(pages.contrast_section(summary) for summary in summaries[1:]),
            pages.tried_section(study, place.tried(choice.tuning_scales).overall, choice),
            pages.reading_section(found),
            pages.paper_section(),
        ]
    )
    (place.folder / "paper_table.md").write_text(page)
    scores = pl.concat([frame for summary in summaries for frame in (summary.methods, summary.overall)])
    comparisons = pl.concat([summary.comparisons for summary in summaries])
    for name, frame in (("scores", scores), ("comparisons", comparisons), ("reading", found)):
        frame.write_parquet(place.folder / f"{name}.parquet")
    together = pl.concat(texts)
    charts = {
        "product_by_scale": plots.product_by_scale(results_table(together)),
        "coherence_behaviour": plots.coherence_behaviour(results_table(together)),
        "scores": plots.score_bars(pl.concat([summary.methods for summary in summaries])),
    }
    for name, chart in charts.items():
        plots.save(chart, place.folder / "plots", name)
    return page


def plan(place: Workplace, rate: float | None) -> str:
    """How much there is to do. Where nothing is chosen yet, the first setting of each method stands for the chosen one."""
    study = place.study
    scales = tuple(float(n) for n in range(study.scale_count + 1))
    methods = {family: tried[0] for family, tried in study.tried}
    chosen = place.chosen() if place.tuned.is_file() else Chosen(scales, scales, methods, "measured")
    parts = [*study.tuning(), *study.report(chosen)]
    experiment = study.experiment(parts[0], (0.0,))
    seconds = {"given": rate} if rate is not None else seconds_a_text(experiment)
    rows = [(part, part.texts(chosen.scales), place.there(part)) for part in parts]
    return pages.plan_section(rows, len(chosen.scales) - 1, seconds, experiment.execution.actors)


def _study(given: argparse.Namespace) -> Study:
    study = QUICK if given.quick else FULL
    return dataclasses.replace(study, changes=(*study.changes, *given.changes))


def main(words: list[str] | None = None) -> int:
    """Do the steps that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="tune | report | show", help="by default all, in this order")
    parser.add_argument("--work", type=Path, default=Path("build/paper_table"), help="folder of all run folders")
    parser.add_argument("--plan", action="store_true", help="say what there is to do, and do nothing")
    parser.add_argument(
        "--rate", type=float, metavar="SECONDS", help="for --plan: seconds a text and actor, instead of measuring"
    )
    parser.add_argument("--quick", action="store_true", help="random weights and few texts")
    parser.add_argument("--progress", choices=("auto", "bars", "lines", "none"), default="auto")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="changes", help="change one setting"
    )
    given = parser.parse_args(words)
    if unknown := set(given.steps) - set(STEPS):
        parser.error(f"unknown step {sorted(unknown)[0]!r}; expected {', '.join(STEPS)}")
    place = Workplace(_study(given), given.work, given.progress)
    try:
        if given.plan:
            print(plan(place, given.rate))
            return 0
        given.work.mkdir(parents=True, exist_ok=True)
        steps = given.steps or STEPS
        if "tune" in steps:
            place.tune()
        if "report" in steps:
            place.report()
        if "show" in steps:
            print(show(place))
    except InputError as error:
        print(f"paper_table.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("paper_table.py: stopped; run the same command again to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
