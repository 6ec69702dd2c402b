"""Effects that are known without measuring: whose, by which settings, and nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from saets.experiment.config import PRESETS, Experiment
from saets.experiment.goal import load_goal
from saets.experiment.loading import effect_settings, load_experiment
from saets.features.known_effects import STRONGEST, KnownEffect, KnownEffects
from saets.fit.approximator import EffectApproximator
from saets.records import unit, vector_id
from saets.run_folder.rows import tensor_column
from saets.run_folder.store import RunFolder

ROW = torch.randn(32, generator=torch.Generator().manual_seed(3))
D_SAE = 64


def effect(value: float) -> NDArray[np.float16]:
    made = np.linspace(-0.1, 0.1, D_SAE).astype(np.float16)
    made[5], made[9], made[60] = value, -2 * value, value / 2
    return made


def write(run: RunFolder, value: float) -> None:
    direction = unit(ROW.numpy())
    table = {"vector_id": [vector_id(direction)], "vector": tensor_column([direction]), "effect": tensor_column([effect(value)])}
    run.effects.write(pa.table({**table, "standard_error": [0.1], "calibration": ["ok"]}))


@pytest.fixture
def run(tmp_path: Path, tiny_experiment: Experiment) -> RunFolder:
    """A run of the tiny experiment that has measured one vector."""
    run = RunFolder.create(tmp_path / "run", tiny_experiment, effect_settings(tiny_experiment))
    write(run, 1.0)
    return run


def files(run: RunFolder) -> dict[str, int]:
    assert run.path.local
    return {str(path): path.stat().st_mtime_ns for path in run.path.local.rglob("*") if path.is_file()}


def test_an_effect_names_the_feature_itself_and_the_others_that_change_most() -> None:
    found = KnownEffect.of(5, effect(1.0))
    assert found.own == 1.0
    assert [(one.feature, one.effect) for one in found.others[:2]] == [(9, -2.0), (60, 0.5)]
    assert len(found.others) == STRONGEST
    assert 5 not in {one.feature for one in found.others}


def test_the_newest_row_of_a_decoder_row_that_was_measured_is_found_and_no_other(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    known = KnownEffects.of(tiny_experiment, run)
    assert known.measured({5: ROW, 6: torch.ones(32)}) == {5: KnownEffect.of(5, effect(1.0))}
    write(run, 2.0)
    assert known.measured({5: ROW})[5].own == 2.0


def test_a_run_folder_is_only_read(run: RunFolder, tiny_experiment: Experiment) -> None:
    approximator(run)
    before = files(run)
    known = KnownEffects.of(tiny_experiment, run)
    assert known.measured({5: ROW}).keys() == known.predicted([5]).keys()
    assert files(run) == before


def test_effects_by_other_settings_are_left_alone(run: RunFolder, tiny_experiment: Experiment, tmp_path: Path) -> None:
    other = tiny_experiment.model_copy(update={"hook_name": "blocks.1.hook_resid_post"})
    known = KnownEffects.of(other, run)
    assert (known.measured({5: ROW}), known.predicted([5])) == ({}, {})
    nowhere = KnownEffects.of(tiny_experiment, RunFolder(tmp_path / "nowhere"))
    assert (nowhere.measured({5: ROW}), nowhere.predicted([5])) == ({}, {})
    assert not (tmp_path / "nowhere").exists()


def approximator(run: RunFolder) -> EffectApproximator:
    generator = torch.Generator().manual_seed(4)
    made = EffectApproximator(torch.randn(32, D_SAE, generator=generator), torch.randn(D_SAE, generator=generator))
    made.save(run.approximator)
    return made


def test_the_runs_approximator_predicts_what_sae_ts_for_the_feature_alone_does(
    run: RunFolder, tiny_experiment: Experiment
) -> None:
    made = approximator(run)
    vector = normalize(normalize(made.M[:, 7], dim=0) - normalize(made.M @ made.b, dim=0), dim=0)
    expected = vector @ made.M + made.b
    found = KnownEffects.of(tiny_experiment, run).predicted([7])[7]
    assert found.own == pytest.approx(expected[7].item(), rel=1e-4)
    strongest = [i for i in expected.abs().argsort(descending=True).tolist() if i != 7][:STRONGEST]
    assert [one.feature for one in found.others] == strongest


def test_what_is_shipped_for_smollm2_tells_measured_and_predicted_effects_without_a_run(tmp_path: Path) -> None:
    known = KnownEffects.of(load_experiment("smollm2"), RunFolder(tmp_path / "nowhere"))
    links = pl.read_parquet(PRESETS / "smollm2" / "links.parquet")
    there, not_there = (links.filter(pl.col("effects").is_null() == missing).row(0, named=True) for missing in (False, True))
    rows = {one["feature"]: torch.ones(576) for one in (there, not_there)}
    linked = known.measured(rows)
    assert linked.keys() == {there["feature"]}, "the other feature's row was not measured"
    strongest = [one["feature"] for one in there["effects"] if one["feature"] != there["feature"]]
    assert [one.feature for one in linked[there["feature"]].others] == strongest[:STRONGEST]
    (love, _), *_ = load_goal("love").features["smollm2"].target
    assert known.predicted([love])[love].own > 0
    assert known.predicted_by.endswith("measured vectors that come with smollm2")


def test_shipped_effects_by_other_settings_are_left_alone(tmp_path: Path) -> None:
    known = KnownEffects.of(load_experiment("smollm2", ["effects.length=24"]), RunFolder(tmp_path / "nowhere"))
    assert known.predicted([1]) == known.measured({0: torch.ones(576)}) == {}
