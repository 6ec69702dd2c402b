"""Measures how long `saets report` takes for a large run, and how long its page takes to open in Chromium.

    python scripts/measure_report.py [--goals 9] [--methods 6] [--samples 16] [--openings 5] [--keep FOLDER]

The run is made up: vectors, texts and grades are drawn by chance and written as the stages write them, without a model. Each
opening has an empty profile of the browser; `ready` is when the page can be used, `drawn` when every chart is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from browser import Browser, find_chromium

from saets.checks import check_goals
from saets.experiment.config import Experiment
from saets.experiment.goal import goal_names
from saets.experiment.loading import effect_settings, load_experiment
from saets.experiment.method_id import METHOD_IDS
from saets.files.storage import Where
from saets.judge.choice import judge_name
from saets.records import CRITERIA, Generation, GenerationItem, Grade
from saets.run_folder.rows import generation_rows, grade_rows
from saets.run_folder.store import RunFolder
from saets.stages.evaluate import generation_items, grade_settings
from saets.stages.report import write_report
from saets.stages.session import Session
from saets.vector.vector import SteeringVector

WORDS = (
    "the",
    "of",
    "a",
    "river",
    "bridge",
    "wedding",
    "angry",
    "love",
    "town",
    "slowly",
    "and",
    "never",
    "quite",
    "hoped",
    "for",
)


def made_up_experiment(goals: Sequence[str], methods: Sequence[str], scales: Sequence[float], samples: int) -> Experiment:
    """The tiny experiment with these goals, methods, scales and samples."""
    settings = load_experiment("tiny").model_dump(mode="json", exclude_none=True)
    features = {Path(name).stem: [[3 + i, 1.0]] for i, name in enumerate(goals)}
    settings["steering"] |= {"goals": goals, "methods": methods, "features": features}
    settings["evaluation"] |= {"scales": scales, "samples": samples}
    return Experiment.model_validate(settings)


def words_of(item: GenerationItem) -> str:
    """Some thirty words that depend on the item alone."""
    rng = np.random.default_rng(int(item.generation_id, 16))
    return " " + " ".join(rng.choice(WORDS, 26))


def score_of(item: GenerationItem, criterion: str) -> float | None:
    """Behaviour that rises with the scale and coherence that falls, each goal and method in its own way, with noise."""
    rng = np.random.default_rng([int(item.generation_id, 16) % 2**32, len(criterion)])
    way = np.random.default_rng([*f"{item.goal}{item.method}".encode()]).uniform(0.5, 1.5)
    strength = item.scale * way / 100
    mean = 0.1 + 0.8 * (1 - np.exp(-strength)) if criterion == "behaviour" else 0.95 / (1 + np.exp(3 * (strength - 1.6)))
    return float(np.clip(mean + 0.15 * rng.standard_normal(), 0, 1))


def made_up_run(
    where: Where,
    experiment: Experiment,
    *,
    completion: Callable[[GenerationItem], str] = words_of,
    score: Callable[[GenerationItem, str], float | None] = score_of,
    reply: str = "similarity 0.412, loss 2.71, repetition 0.05",
) -> Session:
    """A run folder with vectors, texts and grades; where `score` gives None, the reply is why grading failed."""
    run = RunFolder.create(where, experiment, effect_settings(experiment))
    session = Session.looking(experiment, where)
    vectors = {}
    for goal in check_goals(experiment):
        for i, method in enumerate(experiment.steering.methods):
            drawn = torch.randn(32, generator=torch.Generator().manual_seed(i))
            scales = {"low": 20.0, "high": 140.0, "outcome": "ok"}
            vectors[goal.id, method] = SteeringVector.from_tensor(drawn, experiment.hook_name, scales=scales)
            vectors[goal.id, method].save(run.vector(goal.id, method))
    items = generation_items(session, vectors)
    run.generations.write(generation_rows([Generation(**asdict(item), completion=completion(item)) for item in items]))
    name = judge_name(experiment.judge)
    for goal in check_goals(experiment):
        grades = []
        for item in (one for one in items if one.goal == goal.id):
            for criterion in CRITERIA:
                found = score(item, criterion)
                said, error = (reply, None) if found is not None else ("", reply)
                grades.append(Grade(item.generation_id, criterion, found, said, error, name))
        run.grades(goal.id, grade_settings(session, goal)).write(grade_rows(grades))
    return session


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goals", type=int, default=9)
    parser.add_argument("--methods", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--openings", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write the run here and leave it")
    options = parser.parse_args(arguments)
    scales = [float(scale) for scale in range(0, 301, 20)]
    experiment = made_up_experiment(goal_names()[: options.goals], METHOD_IDS[: options.methods], scales, options.samples)
    with tempfile.TemporaryDirectory() as temporary:
        session = made_up_run(options.keep or Path(temporary) / "run", experiment)
        start, worked = time.perf_counter(), time.process_time()
        file = write_report(session)
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
        assert file.local is not None
        texts = len(session.run.generations.ids())
        print(
            f"{options.goals} goals, {options.methods} methods, {len(scales)} scales, {options.samples} samples: {texts:,} texts"
        )
        print(f"report made in {seconds:.1f} s, {worked:.1f} s of processor time; {file.local.stat().st_size / 1e6:.2f} MB")
        program = find_chromium()
        if program is None:
            print("no Chromium is installed, so the page is not opened; Debian: apt-get install chromium")
            return 0
        times: dict[str, list[float]] = {"ready": [], "drawn": []}
        for _ in range(options.openings):
            with Browser(program) as browser, browser.page(file.local) as page:
                for name, found in times.items():
                    found.append(float(page.wait_for(f"document.documentElement.dataset.{name}")) / 1000)
        for name, found in times.items():
            print(f"{name}: median {statistics.median(found):.2f} s, slowest {max(found):.2f} s of {len(found)} openings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
