"""The paper's experiment at its smallest: settings are chosen on some goals, others are reported, a second run adds nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import paper_table
import polars as pl
import pytest
import torch
from paper import pages
from paper.carrying_out import Workplace, seconds_a_text
from paper.reading import TABLE
from paper.study import DEVELOPMENT_GOALS, FULL, PAPER_GOALS, QUICK, TRIED, Chosen, scale_grid

from saets.distributed.cluster import Cluster
from saets.errors import InputError
from saets.experiment.goal import goal_features, load_goal
from saets.experiment.loading import load_experiment
from saets.fit.approximator import EffectApproximator
from saets.run_folder.store import RunFolder
from saets.vector.vector import SteeringVector

CHOSEN = Chosen((0.0, 0.1, 0.2), (0.0, 0.1, 0.4), {family: tried[-1] for family, tried in TRIED.items()}, "measured")


def test_nothing_of_the_report_is_used_for_choosing() -> None:
    assert not {*DEVELOPMENT_GOALS} & {*PAPER_GOALS}
    report, tuning = FULL.report(CHOSEN), FULL.tuning()
    assert not {prompt for part in report for prompt in part.prompts} & {prompt for part in tuning for prompt in part.prompts}
    assert sorted(goal for part in report for goal in part.goals) == sorted(PAPER_GOALS)
    texts = {
        name: {str(text) for goal in goals for text in load_goal(goal).contrast.positive}
        for name, goals in (("report", PAPER_GOALS), ("tuning", DEVELOPMENT_GOALS))
    }
    assert not texts["report"] & texts["tuning"]


def test_every_part_is_an_experiment_whose_goals_have_what_its_methods_need() -> None:
    for part in (*FULL.tuning(), *FULL.report(CHOSEN)):
        experiment = FULL.experiment(part, CHOSEN.scales)
        assert experiment.steering.methods == part.methods
        assert (experiment.evaluation.scale_unit, experiment.evaluation.scales) == ("residual", CHOSEN.scales)
        if "sae" in part.methods:
            assert all(goal_features(load_goal(goal), experiment).target for goal in part.goals)


def test_scales_go_from_the_lowest_to_the_highest_in_even_steps_of_their_logarithm() -> None:
    grid = scale_grid(10.0, 160.0, 100.0, 5)
    assert (grid[0], grid[1], grid[-1]) == (0.0, 0.1, 1.6)
    assert np.allclose(np.diff(np.log(grid[1:])), math.log(2), atol=0.05)


def test_a_plan_counts_every_text_and_the_hours_that_they_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_table.main(["--plan", "--quick", "--rate", "3.6", "--work", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    tuning = 2 * (8 * 2 + 1) * 4 + 2 * (1 * 2 + 1) * 4
    report = 2 * (9 * 2 + 1) * 2 * 4 + 1 * (2 * 2 + 1) * 2 * 4
    assert f"{tuning + report} texts to go" in printed
    assert f"{(tuning + report) * 3.6 / 3600:.1f} hours" in printed
    assert not list(tmp_path.iterdir())


def test_what_a_text_takes_is_measured_by_writing_and_grading_some() -> None:
    seconds = seconds_a_text(QUICK.experiment(QUICK.tuning()[0], (0.0,)))
    assert seconds.keys() == {"writing", "grading"}, "the local judge measures as it grades"
    assert all(value > 0 for value in seconds.values())


def test_a_report_needs_chosen_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper_table.main(["report", "--quick", "--work", str(tmp_path)]) == 2
    assert "run `tune` first" in capsys.readouterr().err


def test_the_papers_means_are_those_that_it_prints() -> None:
    means = [float(cell) for cell in pages.paper_section().splitlines()[-1].split("|")[2:-1]]
    assert means == pytest.approx([0.2165, 0.1290, 0.3600, 0.1197, 0.3115, 0.2531, 0.2184, 0.3376], abs=6e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a whole quick study."""
    work = tmp_path_factory.mktemp("study")
    with Cluster(load_experiment("tiny").execution) as cluster:
        cluster.connect()
        assert paper_table.main(["--quick", "--work", str(work), "--progress", "none"]) == 0
    return work


@pytest.mark.ray
def test_the_report_holds_every_goal_and_method_and_the_tuning_every_setting(finished: Path) -> None:
    place = Workplace(QUICK, finished)
    scores, chosen = pl.read_parquet(finished / "scores.parquet"), place.chosen()
    for part in QUICK.report(chosen):
        for goal in part.goals:
            assert set(scores.filter(pl.col("goal") == goal)["method"]) == set(part.methods)
    assert set(scores.filter(pl.col("goal") == "london")["method"]) == {"caa", chosen.methods["fgaa"]}
    page = (finished / "paper_table.md").read_text()
    tried = page.split("## Settings tried")[1].split("##")[0]
    assert sum(line.startswith("| ") for line in tried.splitlines()) == 2 + 8 + 1
    assert tried.count("chosen") == 4
    assert {path.suffix for path in (finished / "plots").iterdir()} >= {".html", ".svg", ".png"}


@pytest.mark.ray
def test_all_parts_have_the_same_effects_which_are_measured_once(finished: Path) -> None:
    parts = ("tune", "tune-alike", "report", "report-contrast")
    assert len({tuple(shard.name for shard in RunFolder(finished / part).effects.shards()) for part in parts}) == 1
    assert len({(finished / part / "approximator.safetensors").read_bytes() for part in parts}) == 1


@pytest.mark.ray
def test_scales_of_the_report_reach_as_high_as_any_of_its_methods_on_a_development_goal(finished: Path) -> None:
    chosen, run = Workplace(QUICK, finished).chosen(), RunFolder(finished / "tune")
    length = run.manifest()["residual"]["length"]

    def calibrated(methods: Iterable[str]) -> list[float]:
        vectors = [SteeringVector.load(run.vector(goal, method)) for goal in QUICK.development for method in methods]
        return [vector.provenance["scales"]["high"] / length for vector in vectors]

    methods = QUICK.calibrated(chosen.methods).methods
    assert {"caa", "sae", "rotation", *chosen.methods.values()} <= set(methods)
    highs, tried = calibrated(methods), calibrated(method for _, some in QUICK.tried for method in some)
    assert (chosen.scales[1], chosen.scales[-1]) == (pytest.approx(min(highs), rel=0.1), pytest.approx(max(highs), rel=0.1))
    assert chosen.tuning_scales[1:] == pytest.approx((min(tried) / 2, max(tried)), rel=0.1)


@pytest.mark.ray
def test_the_best_of_the_settings_tried_is_chosen(finished: Path) -> None:
    place = Workplace(QUICK, finished, "none")
    chosen = place.chosen()
    scores = dict(place.tried(chosen.tuning_scales).overall.select("method", "held_out").iter_rows())
    for family, tried in QUICK.tried:
        names = [*tried, *(f"{method} (all alike)" for method in QUICK.alike if family == "constrained")]
        best = max(names, key=scores.__getitem__)
        assert chosen.methods[family] == best.removesuffix(" (all alike)")
    assert chosen.stillness == ("equal" if best.endswith("alike)") else "measured")


@pytest.mark.ray
def test_facts_are_those_of_vectors_texts_and_effects(finished: Path) -> None:
    facts = pl.read_parquet(finished / "reading.parquet")
    assert facts.schema == pl.Schema(TABLE)
    run = finished / "report"
    approximator = EffectApproximator.load(run / "approximator.safetensors")
    target = torch.zeros(64)
    target[2] = 1.0
    for row in facts.filter(pl.col("goal") == "anger").iter_rows(named=True):
        vector = SteeringVector.load(RunFolder(run).vector("anger", row["method"]))
        assert row["gain"] == pytest.approx((approximator.M @ target @ vector.direction).item(), abs=1e-5)
        column, bias = approximator.M[:, 2], approximator.M @ approximator.b
        assert row["column_and_bias"] == pytest.approx(torch.cosine_similarity(column, bias, dim=0).item(), abs=1e-5)
        length = json.loads((run / "manifest.json").read_text())["residual"]["length"]
        assert row["calibrated"] == pytest.approx(vector.provenance["scales"]["high"] / length)
    by_method = facts.filter(pl.col("goal") == "anger")
    assert by_method["column_and_row"].n_unique() == 1
    steered = facts.filter((pl.col("scale") > 0) & (pl.col("goal") != "london"))
    assert not steered["measured_others"].has_nulls()
    assert facts.filter(pl.col("goal") == "london")["gain"].is_null().all()


@pytest.mark.ray
def test_a_second_run_writes_no_text_and_the_same_tables(finished: Path) -> None:
    texts = {path: path.stat().st_mtime_ns for path in finished.glob("*/generations/*")}
    page, tuned = (finished / "paper_table.md").read_text(), (finished / "tuned.json").read_text()
    assert paper_table.main(["--quick", "--work", str(finished), "--progress", "none"]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/generations/*")} == texts
    assert ((finished / "paper_table.md").read_text(), (finished / "tuned.json").read_text()) == (page, tuned)


def test_settings_of_the_study_can_be_changed(tmp_path: Path) -> None:
    part = QUICK.tuning()[0]
    changed = dataclasses.replace(QUICK, changes=(*QUICK.changes, "evaluation.new_tokens=5"))
    assert changed.experiment(part, (0.0,)).evaluation.new_tokens == 5
    with pytest.raises(InputError, match="did you mean 'new_tokens'"):
        dataclasses.replace(QUICK, changes=("evaluation.new_token=5",)).experiment(part, (0.0,))
