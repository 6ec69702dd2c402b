"""The study's run folders, filled by the stages of `saets`; whatever is done already is skipped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from paper.study import Chosen, Part, Study, scale_grid
from saets.checks import check_all
from saets.commands.common import errors
from saets.distributed.pool import SteeringActor
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import load_goal
from saets.generation import texts_per_batch
from saets.records import GenerationItem
from saets.run_folder.store import RunFolder
from saets.scores.summary import Summary, summarise
from saets.stages.effects import measure_effects
from saets.stages.evaluate import evaluate
from saets.stages.fit import fit_approximator
from saets.stages.measures import measure_completions
from saets.stages.pull import stands_in, use_published
from saets.stages.results import read_outcome, write_results
from saets.stages.scales import residual_length
from saets.stages.session import Session
from saets.stages.side_effects import measure_side_effects
from saets.stages.vectors import Pair, build_vectors
from saets.terminal.display import shown_progress
from saets.vector.vector import SteeringVector

ALIKE = " (all alike)"
"""Behind the name of a setting that held all features still alike."""

_TEXT = ["goal", "method", "prompt", "scale", "sample"]


@dataclass(frozen=True)
class Workplace:
    """The folder that holds the run folders, and how work in them is shown."""

    study: Study
    folder: Path
    progress: str = "auto"

    @property
    def tuned(self) -> Path:
        """What the development goals chose, once they have."""
        return self.folder / "tuned.json"

    @contextlib.contextmanager
    def opened(self, part: Part, scales: Sequence[float]) -> Iterator[Session]:
        """A part's session, after what it needs has been checked."""
        experiment = self.study.experiment(part, scales)
        check_all(experiment)
        self._begin(part)
        with (
            shown_progress(errors, self.progress) as progress,
            Session.open(experiment, self.folder / part.name, progress) as session,
        ):
            yield session

    def _begin(self, part: Part) -> None:
        """A new run folder begins with the effects and the fit of the tuning, which are the same for all parts."""
        first, here = self.folder / self.study.tuning()[0].name, self.folder / part.name
        if here.is_dir() or not (first / "effects").is_dir() or not RunFolder(first).approximator.is_file():
            return
        begun = self.folder / f".{part.name}"
        shutil.rmtree(begun, ignore_errors=True)
        shutil.copytree(first / "effects", begun / "effects")
        for name in ("approximator.safetensors", "experiment.toml", "fit.json"):
            shutil.copy(first / name, begun)
        facts = RunFolder(first).manifest()
        facts.pop("vectors", None)
        (begun / "manifest.json").write_text(json.dumps(facts))
        begun.rename(here)

    def scales(self, part: Part, below: float) -> tuple[float, ...]:
        """From `below` times the lowest calibrated scale of a part's vectors to the highest; vectors are made where missing."""
        with self.opened(part, (0.0,)) as session:
            vectors = _vectors(session)
            highs = [high for vector in vectors.values() if (high := vector.provenance["scales"]["high"])]
            return scale_grid(below * min(highs), max(highs), residual_length(session), self.study.scale_count)

    def tune(self) -> None:
        """Grade every setting on the development goals, and choose by the mean held-out score."""
        scales = self.scales(self.study.tuning()[0], 0.5)
        for part in self.study.tuning():
            with self.opened(part, scales) as session:
                _graded(session)
        scores = dict(self.tried(scales).overall.select("method", "held_out").iter_rows())
        methods, stillness = {}, "measured"
        for family, tried in self.study.tried:
            of_family = [*tried, *(method + ALIKE for method in self.study.alike if family == "constrained")]
            best = max(of_family, key=lambda method: scores.get(method, float("-inf")))
            methods[family] = best.removesuffix(ALIKE)
            if best.endswith(ALIKE):
                stillness = "equal"
        chosen = Chosen(scales, self.scales(self.study.calibrated(methods), 1.0), methods, stillness)
        self.tuned.write_text(json.dumps(dataclasses.asdict(chosen), indent=1) + "\n")

    def tried(self, scales: Sequence[float]) -> Summary:
        """Every setting on the development goals; the names of those tried once more end in `ALIKE`."""
        found: list[pl.DataFrame] = []
        for part in self.study.tuning():
            with self.opened(part, scales) as session:
                texts = read_outcome(session).texts
            found.append(_renamed(texts) if found else texts)
        return summarise(pl.concat(found).unique(_TEXT, keep="first", maintain_order=True))

    def chosen(self) -> Chosen:
        """What `tune` chose. Raises `InputError` where it has not been run to its end."""
        if not self.tuned.is_file():
            raise InputError(f"no settings are chosen in {self.folder} yet; run `tune` first")
        record = json.loads(self.tuned.read_text())
        scales = (tuple(record[name]) for name in ("tuning_scales", "scales"))
        return Chosen(*scales, record["methods"], record["stillness"])

    def report(self) -> None:
        """Write and grade the texts of all goals with the chosen settings, and measure side effects."""
        chosen = self.chosen()
        for part in self.study.report(chosen):
            with self.opened(part, chosen.scales) as session:
                _graded(session)
                measure_side_effects(session)

    def there(self, part: Part) -> int:
        """Completions that a part's run folder holds."""
        run = self.folder / part.name
        return len(RunFolder(run).generations.ids()) if run.is_dir() else 0


def _vectors(session: Session) -> dict[Pair, SteeringVector]:
    if stands_in(session):
        use_published(session)
    else:
        measure_effects(session)
        fit_approximator(session)
    return build_vectors(session)


def _graded(session: Session) -> None:
    evaluate(session, _vectors(session))
    measure_completions(session)
    write_results(session)


def _renamed(texts: pl.DataFrame) -> pl.DataFrame:
    named = pl.when(pl.col("method") == "unsteered").then("method").otherwise(pl.col("method") + ALIKE)
    return texts.with_columns(named.alias("method"))


def seconds_a_text(experiment: Experiment) -> Mapping[str, float]:
    """What an actor takes to write a text and to grade it (with a server's judge, to measure it): one batch here, steered.

    Reading weights and calibrating the judge on its examples are left out.
    """
    actor: Any = SteeringActor(experiment.model_dump_json())
    goal, prompt = load_goal(experiment.steering.goals[0]), experiment.evaluation.prompts[0]
    count = texts_per_batch(experiment)
    items = [GenerationItem(str(n), goal.id, "timed", "timed", 1.0, prompt, n, n) for n in range(count)]
    direction = torch.nn.functional.normalize(torch.ones(actor.engine.decoder.d_model), dim=0).numpy()
    actor.generate(items[:1], {"timed": direction})
    timed = {}
    started = time.monotonic()
    texts = actor.generate(items, {"timed": direction})
    timed["writing"] = (time.monotonic() - started) / count
    local = experiment.judge.kind == "local"
    read = (lambda texts: actor.grade(goal, texts)) if local else actor.measure
    read(texts[:1])
    started = time.monotonic()
    read(texts)
    timed["grading" if local else "measuring"] = (time.monotonic() - started) / count
    return timed
