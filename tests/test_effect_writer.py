"""Effects on disk: what comes before the baseline waits there, and every vector is written once."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from saets.effects.worker import Measurement
from saets.engine.calibration import Calibration
from saets.experiment.config import BASELINE, Effects
from saets.records import VectorItem, vector_id
from saets.run_folder.rows import measurement_rows, measurements_of
from saets.run_folder.store import RunFolder, read_shard
from saets.stages.effects import EffectWriter

SETTINGS = Effects(loss_increase=0.5, baseline_blocks=2)


def measured(source: str, index: int, *, features: bool = False) -> Measurement:
    draw = np.random.default_rng([len(source), index])
    direction = draw.standard_normal(8).astype(np.float32)
    name = f"{BASELINE}-{index}" if source == BASELINE else vector_id(direction)
    return Measurement(
        item=VectorItem(name, source, index, direction),
        mean=draw.random(12).astype(np.float32),
        error_variance=0.25,
        feature_error_variance=draw.random(12).astype(np.float32) if features else None,
        calibration=Calibration(3.5, 4.0, "ok"),
        unsteered_loss=3.5,
        n_rollouts=6,
        n_tokens=72,
    )


BLOCKS = [measured(BASELINE, 0), measured(BASELINE, 1)]
VECTORS = [measured("decoder", index) for index in range(5)]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path)


def effects(run: RunFolder) -> dict[int, np.ndarray]:
    """Every row on disk, none merged with another."""
    frame = pl.concat([pl.from_arrow(read_shard(shard)) for shard in run.effects.shards()])
    assert frame["index"].is_unique().all()
    return dict(zip(frame["index"], frame["effect"].to_numpy(), strict=True))


def check(run: RunFolder) -> None:
    baseline = (BLOCKS[0].mean + BLOCKS[1].mean) / 2
    found = effects(run)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for vector in VECTORS:
        assert np.allclose(found[vector.item.index], vector.mean - baseline, atol=1e-3)
    assert not run.waiting.shards()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 0, 1], [0, 2, 3, 1, 4, 5, 6], [6, 1, 5, 0, 4, 3, 2]])
def test_effects_do_not_depend_on_when_the_baseline_comes(run: RunFolder, order: list[int]) -> None:
    everything = [*BLOCKS, *VECTORS]
    with EffectWriter(run, SETTINGS) as writer:
        for i in order:
            writer.add([everything[i]])
    check(run)


def test_what_waited_for_the_baseline_survives_and_is_written_once(run: RunFolder) -> None:
    with EffectWriter(run, SETTINGS) as writer:
        writer.add(VECTORS[:3])
    assert not run.effects.shards()
    assert run.waiting.ids() == {vector.item.vector_id for vector in VECTORS[:3]}
    with EffectWriter(run, SETTINGS) as writer:
        writer.add(BLOCKS)
        writer.add(VECTORS[3:])
    check(run)


def test_a_kill_between_writing_effects_and_removing_what_waited_doubles_nothing(run: RunFolder) -> None:
    with EffectWriter(run, SETTINGS) as writer:
        writer.add([*BLOCKS, *VECTORS[:3]])
    run.waiting.write(measurement_rows(VECTORS))  # as such a kill leaves it
    with EffectWriter(run, SETTINGS):
        pass
    check(run)


def test_rows_are_on_disk_when_the_stage_fails(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), EffectWriter(run, SETTINGS) as writer:
        writer.add([*BLOCKS, *VECTORS])
        raise RuntimeError
    check(run)


@pytest.mark.parametrize("features", [False, True])
def test_measurements_come_back_from_their_rows(features: bool) -> None:
    before = [measured("decoder", index, features=features) for index in range(3)]
    for old, new in zip(before, measurements_of(measurement_rows(before)), strict=True):
        assert (new.item.vector_id, new.item.source, new.item.index) == (old.item.vector_id, old.item.source, old.item.index)
        assert np.array_equal(new.item.direction, old.item.direction)
        assert np.array_equal(new.mean, old.mean)
        assert new.calibration == old.calibration
        assert (new.feature_error_variance is None) is not features
        if features:
            assert np.array_equal(new.feature_error_variance, old.feature_error_variance)


def test_the_size_of_the_rows_and_what_rounding_adds_are_told(run: RunFolder) -> None:
    with EffectWriter(run, SETTINGS) as writer:
        assert writer.storage() is None
        writer.add([*BLOCKS, *VECTORS])
    stored = writer.storage()
    assert stored is not None
    baseline = ((BLOCKS[0].mean.astype(np.float64) + BLOCKS[1].mean) / 2).astype(np.float32)
    exact = np.stack([vector.mean - baseline for vector in VECTORS])
    rounding = np.sqrt(np.mean(np.square(exact.astype(np.float16).astype(np.float64) - exact)))
    assert stored["rounding_rms"] == pytest.approx(rounding, rel=1e-3)
    assert stored["standard_error_rms"] == pytest.approx(np.sqrt(0.25 + 0.25 / 2))
    size = sum(path.stat().st_size for path in (run.path / "effects").local.glob("*.parquet"))
    assert stored["megabytes_per_10000_vectors"] == pytest.approx(size / 5 * 1e4 / 1e6)


def test_float32_effects_lose_nothing_and_float16_a_2048th(run: RunFolder, tmp_path) -> None:
    exact = RunFolder(tmp_path / "exact")
    for folder, dtype in ((run, "float16"), (exact, "float32")):
        with EffectWriter(folder, SETTINGS.model_copy(update={"dtype": dtype})) as writer:
            writer.add([*BLOCKS, *VECTORS])
    baseline = (BLOCKS[0].mean.astype(np.float64) + BLOCKS[1].mean) / 2
    for index, effect in effects(exact).items():
        assert effect.dtype == np.float32
        assert np.array_equal(effect, VECTORS[index].mean - baseline.astype(np.float32))
        half = effects(run)[index]
        assert half.dtype == np.float16
        assert (np.abs(half - effect) <= np.abs(effect) / 2048).all()
