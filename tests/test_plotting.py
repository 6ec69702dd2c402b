"""`saets plot` on run folders that hold much, little or nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saets.cli import main
from saets.experiment.config import Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator
from saets.records import CRITERIA, Generation, Grade
from saets.run_folder.fitted import fitted
from saets.run_folder.rows import generation_rows, grade_rows
from saets.run_folder.store import RunFolder
from saets.scores import statistics
from saets.stages.evaluate import generation_items, grade_settings
from saets.stages.plot import Wanted, write_plots
from saets.stages.session import Session
from saets.vector.vector import SteeringVector

METHODS = ("caa", "sae", "sae_ts")
OF_TEXTS = {"product_by_scale", "coherence_behaviour", "scores", *(f"criteria_{method}" for method in METHODS)}
OF_FIT = {"predicted_effects", "r2_by_density"}

CALIBRATED = {
    "scales": {"low": 2.0, "high": 8.0, "outcome": "ok", "loss_increase": 0.5, "losses": [[0, 3.0], [4, 3.2], [8, 3.6]]}
}

Fill = Callable[[Session], None]


@pytest.fixture
def run(measured: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a run folder of the tiny experiment, with which measured effects come, filled by functions."""
    monkeypatch.setattr(statistics, "FLIPS", 200)
    monkeypatch.setattr(statistics, "RESAMPLES", 100)

    def make(*fills: Fill, shipped: bool = True, changes: tuple[str, ...] = ()) -> Path:
        come = [f"effects.shipped={measured.path}"] if shipped else []
        experiment = load_experiment("tiny", [*come, "fit.held_out=0.25", "model.dtype=float32", "model.device=cpu", *changes])
        with Session.open(experiment, tmp_path / "run") as session:
            for fill in fills:
                fill(session)
        return tmp_path / "run"

    return make


def old_vectors(session: Session) -> None:
    """Vectors of all goals and methods, whose files say nothing of their calibration."""
    vectors(session, {})


def vectors(session: Session, provenance: Mapping[str, Any] = CALIBRATED) -> None:
    """Vectors of all goals and methods, whose calibration measured three losses."""
    for goal in session.experiment.steering.goals:
        for number, method in enumerate(METHODS):
            vector = SteeringVector(torch.eye(32)[number], session.experiment.hook_name, dict(provenance))
            vector.save(session.run.vector(goal, method))


def texts(session: Session, score: float | None = 0.5) -> None:
    """Completions of those vectors, with their grades."""
    goals = session.experiment.steering.goals
    made = {
        (goal, method): SteeringVector(torch.eye(32)[number], session.experiment.hook_name)
        for goal in goals
        for number, method in enumerate(METHODS)
    }
    written = [Generation(**asdict(item), completion="text") for item in generation_items(session, made)]
    session.run.generations.write(generation_rows(written))
    for goal in goals:
        grades = [
            Grade(text.generation_id, criterion, score, "", None if score else "HTTP 500", "judge")
            for text in written
            if text.goal == goal
            for criterion in CRITERIA
        ]
        session.run.grades(goal, grade_settings(session, load_goal(goal))).write(grade_rows(grades))


def failed_texts(session: Session) -> None:
    """The same, not one of them graded."""
    texts(session, score=None)


def fit(session: Session) -> None:
    """The approximator that `saets fit` would make of the effects that come with the experiment."""
    found = fitted(session.run, session.experiment)
    replace(found.approximator, provenance={"fit": dict(found.report)}).save(session.run.approximator)


def published_fit(session: Session) -> None:
    """An approximator that others published."""
    provenance = {"published": {"repo": "someone/effects"}}
    EffectApproximator(torch.ones(32, 64), torch.zeros(64), provenance).save(session.run.approximator)


def drawn(folder: Path) -> set[str]:
    """Names of the plots in a folder."""
    return {path.stem for path in folder.iterdir()}


def plot(out: Path, *options: str) -> int:
    return main(["plot", str(out), "--format", "svg", *options])


def test_all_that_a_run_has_is_drawn(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    out = run(vectors, texts, fit)
    assert plot(out) == 0
    assert drawn(out / "plots") == OF_TEXTS | OF_FIT | {"loss_by_scale", "calibration"}
    assert not caplog.records
    before = {path: path.stat().st_mtime_ns for path in (out / "plots").iterdir()}
    assert plot(out) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "plots").iterdir()} == before, "drawn twice"
    assert plot(out, "--size", "page") == 0
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


def test_goals_methods_size_format_and_folder_can_be_chosen(run: Callable[..., Path], tmp_path: Path) -> None:
    out, to = run(vectors, texts), tmp_path / "figures" / "paper"
    chosen = ["--goal", "wedding", "--method", "sae_ts", "--method", "caa", "--size", "column", "--to", str(to)]
    assert main(["plot", str(out), *chosen, "--format", "svg"]) == 0
    assert drawn(to) == (OF_TEXTS - {"criteria_sae"}) | {"loss_by_scale", "calibration"}
    page = (to / "product_by_scale.svg").read_text()
    assert ">wedding</text>" in page
    assert not any(f">{other}</text>" in page for other in ("london", "SAE", "Behaviour × coherence by scale"))
    assert not (out / "plots").exists()


def test_unknown_goals_and_methods_are_refused_by_name(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run(vectors, texts)
    assert plot(out, "--goal", "lodon") == 2
    assert "unknown goal 'lodon'; known: london, wedding; did you mean 'london'" in capsys.readouterr().err
    assert plot(out, "--method", "fgaa") == 2
    assert "unknown method 'fgaa'; known: caa, sae, sae_ts" in capsys.readouterr().err


def test_before_grades_there_are_pictures_of_what_is_measured(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    out = run(vectors, fit)
    assert plot(out) == 0
    assert drawn(out / "plots") == OF_FIT | {"loss_by_scale", "calibration"}
    assert "run `saets generate` first" in caplog.text
    caplog.clear()
    assert plot(out) == 0
    assert "run `saets generate` first" in caplog.text, "said again where nothing is drawn anew"


def test_a_run_of_which_nothing_can_be_drawn_names_the_stage(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot(run(shipped=False)) == 2
    assert "holds no completions; run `saets generate` first" in capsys.readouterr().err


def test_where_no_text_was_graded_scores_are_left_out(run: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    out = run(vectors, failed_texts)
    assert plot(out) == 0
    assert drawn(out / "plots") == {"loss_by_scale", "calibration"}
    assert "none of 56 texts" in caplog.text
    assert "--retry-failed" in caplog.text


@pytest.mark.parametrize("change", ["evaluation.scales=[0]", "evaluation.scales=[8]", "evaluation.samples=1"])
def test_one_scale_or_one_sample_is_enough(change: str, run: Callable[..., Path]) -> None:
    out = run(vectors, texts, changes=(change,))
    assert plot(out) == 0
    assert drawn(out / "plots") >= {"product_by_scale", "coherence_behaviour", "scores"}


def test_without_effects_their_plots_are_left_out_and_it_is_said(
    run: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    out = run(old_vectors, texts, published_fit, shipped=False)
    assert plot(out) == 0
    assert drawn(out / "plots") == OF_TEXTS
    assert "holds no effects; run `saets effects`" in caplog.text
    assert "published without its effects" in caplog.text
    assert "run `saets vectors`" in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_the_papers_scores_stand_beside_those_of_its_model(run: Callable[..., Path]) -> None:
    def is_the_papers(session: Session) -> None:
        model = session.experiment.model.model_copy(update={"name": "google/gemma-2-2b"})
        found: Experiment = session.experiment.model_copy(update={"model": model, "hook_name": "blocks.12.hook_resid_post"})
        vectors(replace(session, experiment=found))
        texts(replace(session, experiment=found))
        (session.run.path / "experiment.toml").write_text(found.to_toml())

    out = run(is_the_papers, shipped=False)
    with Session.open(load_experiment(out), out) as session:
        write_plots(session, Wanted(formats=["svg"]))
    assert "the paper&#39;s, optimistic" in (out / "plots" / "scores.svg").read_text().replace("'", "&#39;")
