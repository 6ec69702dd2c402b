"""Plans a small run, runs it, and prints what was predicted beside what was measured, stage by stage.

    python scripts/predict_run.py [--experiment smollm2] [--out FOLDER] [--set SECTION.KEY=VALUE ...]

By default preset `smollm2` with two goals and few samples, in a temporary folder; `--experiment tiny` does seconds of work and so
shows what starting takes. What was counted (vectors, texts, bytes) is compared too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.experiment.loading import load_experiment
from saets.planning.plan import Plan, make_plan
from saets.stages.effects import measure_effects
from saets.stages.evaluate import evaluate
from saets.stages.fit import fit_approximator
from saets.stages.measures import measure_completions
from saets.stages.plot import write_plots
from saets.stages.results import write_results
from saets.stages.session import Session
from saets.stages.vectors import build_vectors

SMALL = ("evaluation.samples=4", "evaluation.scales=[0, 60]")


def main() -> None:
    """Plan, run, compare, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="smollm2", help="a preset or a TOML file with a local judge")
    parser.add_argument("--out", help="a new run folder; by default a temporary one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    overrides = [*(SMALL if options.experiment == "smollm2" else ()), *options.overrides]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(options.out or Path(temporary) / "run")
        if out.exists():
            parser.error(f"{out} is there already; give a new folder")
        experiment = load_experiment(options.experiment, overrides)
        plan = make_plan(Session.looking(experiment, out))
        with Session.open(experiment, out) as session:
            measured = {
                "effects": timed(lambda: measure_effects(session)),
                "fit": timed(lambda: fit_approximator(session)),
                "vectors": timed(lambda: build_vectors(session)),
                "texts, grading": timed(lambda: evaluate(session, build_vectors(session))),
                "figures": timed(lambda: measure_completions(session)),
                "results": timed(lambda: (write_results(session), write_plots(session))),
            }
            counts = counted(session)
        left = make_plan(Session.looking(experiment, out)).seconds
    predicted = {stage: sum(plan.seconds.get(part, 0.0) for part in stage.split(", ")) for stage in measured}
    print(f"{'stage':<16}{'predicted':>11}{'measured':>11}{'ratio':>8}")
    for stage in (*measured, "all"):
        one, other = (sum(each.values()) if stage == "all" else each[stage] for each in (predicted, measured))
        print(f"{stage:<16}{one:>9.1f} s{other:>9.1f} s{one / other:>8.2f}")
    wanted = planned(plan)
    print(f"\n{'count':<16}{'predicted':>11}{'measured':>11}")
    for name, number in wanted.items():
        print(f"{name:<16}{number:>11,}{counts[name]:>11,}")
    total = sum(predicted.values()) / sum(measured.values())
    facts = {
        "experiment": experiment.name,
        "predicted_over_measured": round(total, 3),
        "predicted_seconds": {name: round(value, 2) for name, value in predicted.items()},
        "measured_seconds": {name: round(value, 2) for name, value in measured.items()},
        "predicted": wanted,
        "measured": counts,
        "left_afterwards": left,
    }
    print(json.dumps(facts))


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    before = time.monotonic()
    work()
    return time.monotonic() - before


def planned(plan: Plan) -> dict[str, int]:
    """What the plan counted."""
    left, sizes = plan.left, {one.what: one.size for one in plan.disk}
    return {
        "vectors": left.vectors,
        "baseline blocks": left.blocks,
        "texts": left.texts.total(),
        "steering vectors": len(left.pairs),
        "bytes of effects": sizes.get("effects", 0),
    }


def counted(session: Session) -> dict[str, int]:
    """What the run folder holds."""
    run = session.run
    shipped = session.shipped()
    blocks = run.baseline.ids() - (shipped.baseline.ids() if shipped else set())
    return {
        "vectors": len(run.effects.ids()),
        "baseline blocks": len(blocks),
        "texts": len(run.generations.ids()),
        "steering vectors": sum(1 for name in (run.path / "vectors").entries() if name.endswith(".safetensors")),
        "bytes of effects": sum(entry.size for name, entry in run.effects.folder.entries().items() if name.endswith(".parquet")),
    }


if __name__ == "__main__":
    main()
