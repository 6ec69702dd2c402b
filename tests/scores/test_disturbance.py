"""Side effects at a given scale: the loss on held-out text, and an effect split into target and rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from saets.effects.calibration_text import calibration_tokens, held_out_tokens
from saets.effects.worker import EffectWorker, Measurement, baseline_items
from saets.engine.calibration import Calibration
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.records import VectorItem, unit
from saets.run_folder.rows import measured_baseline
from saets.scores.disturbance import DisturbanceWorker, shift_of
from saets.scores.page import side_effects_section
from saets.vector.positions import Positions

SCALES = [4.0, 12.0]


def items(d_model: int) -> list[VectorItem]:
    rng = np.random.default_rng(0)
    return [VectorItem(f"v{i}", "chosen", None, unit(rng.normal(size=d_model))) for i in range(len(SCALES))]


def test_a_vector_does_at_a_given_scale_what_it_does_at_that_calibrated_one(tiny: Any, tiny_experiment: Experiment) -> None:
    found = DisturbanceWorker(tiny_experiment, tiny).measure(items(32), SCALES)
    for item, scale, measured in zip(items(32), SCALES, found, strict=True):
        rule = {"loss_increase": None, "target_loss": None, "fixed_scale": scale}
        effects = tiny_experiment.effects.model_copy(update=rule)
        (alone,) = EffectWorker(tiny_experiment.model_copy(update={"effects": effects})).measure([item])
        assert isinstance(measured, Measurement)
        assert isinstance(alone, Measurement)
        assert np.allclose(measured.mean, alone.mean, atol=1e-6)
        assert measured.calibration.scale == scale
        assert measured.calibration.loss != pytest.approx(alone.calibration.loss, abs=1e-6), "another text"


@pytest.mark.parametrize("places", [{"positions": "generated"}, {"positions": "prompt"}, {"positions": "all", "bos": False}])
def test_rollouts_are_steered_where_the_evaluations_texts_are(
    tiny: Any, tiny_experiment: Experiment, places: dict[str, Any]
) -> None:
    evaluation = tiny_experiment.evaluation.model_copy(update=places)
    experiment = tiny_experiment.model_copy(update={"evaluation": evaluation})
    positions = Positions(evaluation.positions, evaluation.bos)
    (item,), scale = items(32)[:1], 12.0
    (found,) = DisturbanceWorker(experiment, tiny).measure([item], [scale])
    calibrated = [Calibration(scale, 0.0, "fixed")]
    (by_hand,) = EffectWorker(experiment, positions=positions).measure_at([item], calibrated)
    (everywhere,) = DisturbanceWorker(tiny_experiment, tiny).measure([item], [scale])
    assert isinstance(found, Measurement) and isinstance(by_hand, Measurement) and isinstance(everywhere, Measurement)
    assert np.allclose(found.mean, by_hand.mean, atol=1e-6)
    assert not np.allclose(found.mean, everywhere.mean, atol=1e-4)
    same_text = found.calibration.loss == pytest.approx(everywhere.calibration.loss, abs=1e-6)
    assert same_text == positions.bos, "held-out text is steered at all positions, at BOS where texts are"


def test_scale_0_changes_no_loss_and_unsteered_blocks_have_no_effect_on_average(tiny: Any, tiny_experiment: Experiment) -> None:
    blocks = baseline_items(tiny_experiment, 32)
    found = [one for one in DisturbanceWorker(tiny_experiment, tiny).measure(blocks, [0.0] * len(blocks))]
    measured = [one for one in found if isinstance(one, Measurement)]
    assert len(measured) == len(blocks)
    for block in measured:
        assert block.calibration.loss == pytest.approx(block.unsteered_loss, abs=1e-6)
    baseline = measured_baseline(measured)
    assert np.allclose(sum(block.mean - baseline.mean for block in measured), 0, atol=1e-6)
    assert baseline.error_variance == pytest.approx(np.mean([block.error_variance for block in measured]) / len(blocks))


def test_held_out_text_follows_that_of_the_calibration_and_shares_no_chunk(tiny: Any, tiny_experiment: Experiment) -> None:
    settings = tiny_experiment.effects
    used, held_out = (read(tiny.tokenizer, settings) for read in (calibration_tokens, held_out_tokens))
    assert used.shape == held_out.shape
    assert not {tuple(chunk) for chunk in used.tolist()} & {tuple(chunk) for chunk in held_out.tolist()}
    assert (held_out[:, 0] == used[0, 0]).all(), "BOS"
    more = calibration_tokens(tiny.tokenizer, settings.model_copy(update={"calibration_chunks": 2 * len(used)}))
    assert held_out.tolist() == more[len(used) :].tolist()


def test_where_the_calibration_used_all_text_nothing_is_held_out(tiny: Any, tiny_experiment: Experiment, tmp_path: Any) -> None:
    (tmp_path / "short.txt").write_text("The river runs past the mill and the old bridge.\n" * 4)
    text = {"calibration_text": str(tmp_path / "short.txt"), "calibration_chunks": 12, "calibration_length": 16}
    settings = tiny_experiment.effects.model_copy(update=text)
    assert len(calibration_tokens(tiny.tokenizer, settings)) == 12
    with pytest.raises(InputError, match="nothing left after the 12 chunks"):
        held_out_tokens(tiny.tokenizer, settings)


def test_a_shift_by_hand() -> None:
    effect = np.array([2.0, 0.3, -0.4, 1.0])
    shift = shift_of(effect, np.array([0.75, 0, 0, 0.25]), 0.02)
    assert shift.target == pytest.approx(0.75 * 2 + 0.25 * 1)
    assert shift.noise == pytest.approx(np.sqrt(0.04))
    assert shift.others == pytest.approx(np.sqrt(0.09 + 0.16 - 0.04))
    assert (shift.largest, shift.largest_effect) == (2, -0.4)
    assert shift_of(effect, np.zeros(4), 9.0).others == 0
    assert np.isnan(shift_of(effect, np.zeros(4), 0.0).target)


def test_noise_alone_is_no_shift_on_average() -> None:
    rng = np.random.default_rng(0)
    lengths = [shift_of(rng.normal(size=4000) * 0.1, np.zeros(4000), 0.01).others for _ in range(50)]
    assert np.mean(np.square(lengths)) < 0.05 * 4000 * 0.01


def test_the_page_shows_perplexities_and_shifts() -> None:
    row = {"goal": "london", "method": "caa", "scale": 40.0, "perplexity": 30.0, "unsteered_perplexity": 20.0}
    row["positions"] = "generated tokens"
    shift = {"target": float("nan"), "others": 1.5, "noise": 0.25, "largest": 7, "largest_effect": -0.5, "n_rollouts": 12}
    page = side_effects_section(pl.DataFrame([{**row, **shift}]), {"caa": "CAA"})
    assert "| london | CAA | 40 | 30.0 (20.0) | – | 1.500 ± 0.250 | 7: -0.500 |" in page
    assert "Steered at generated tokens." in page
