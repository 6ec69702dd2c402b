"""Effects against the algorithm written out: regenerate the texts, run them unsteered, encode, average, subtract."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saets.effects.sources import vector_items
from saets.effects.worker import EffectWorker, Failure, Measurement, baseline_items, effect_of, noise_owner
from saets.engine.batch import Row
from saets.engine.rollout import RolloutEngine
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment.config import BASELINE, Experiment
from saets.experiment.loading import load_experiment
from saets.records import VectorItem
from saets.run_folder.rows import Baseline, effect_rows
from saets.sae import load_sae
from saets.tokens import encode

HOOK = "blocks.2.hook_resid_post"
PIN = ["model.dtype=float32", "model.device=cpu"]


@pytest.fixture(scope="module")
def worker(tiny_experiment: Experiment) -> EffectWorker:
    return EffectWorker(tiny_experiment)


@pytest.fixture(scope="module")
def vectors(tiny_experiment: Experiment) -> list[VectorItem]:
    return list(itertools.islice(vector_items(tiny_experiment, 32), 3))


def measured(worker: EffectWorker, items: Sequence[VectorItem]) -> list[Measurement]:
    found = worker.measure(items)
    assert all(isinstance(result, Measurement) for result in found)
    return [result for result in found if isinstance(result, Measurement)]


@pytest.fixture(scope="module")
def together(worker: EffectWorker, vectors: list[VectorItem]) -> list[Measurement]:
    """All of `vectors`, measured at once."""
    return measured(worker, vectors)


def activations(model: Any, experiment: Experiment, item: VectorItem, scale: float) -> Tensor:
    """f(h_L) [prompts, rollouts, positions, d_sae] of the unsteered model on the item's own steered texts."""
    settings = experiment.effects

    def seed_of(which: int, sample: int) -> int:
        return row_seed(experiment.seed, "effects", item.vector_id, which, sample)

    rows = [
        Row(tuple(encode(model.tokenizer, prompt, settings.prompt_format)), seed_of(which, sample), 0)
        for which, prompt in enumerate(settings.prompts)
        for sample in range(settings.rollouts)
    ]
    engine = RolloutEngine(model, HOOK, top_k=settings.top_k, temperature=settings.temperature)
    tokens = engine.run(rows, scale * torch.from_numpy(item.direction)[None], settings.length).tokens
    residual = model.run_with_cache(tokens, names_filter=HOOK)[1][HOOK]
    sae = load_sae(experiment.sae, 32)
    acts = torch.relu((residual - sae.b_dec) @ sae.W_enc + sae.b_enc)
    return acts.view(len(settings.prompts), settings.rollouts, settings.length, -1)


def test_an_effect_is_the_mean_over_all_rollouts_and_positions_steered_minus_unsteered(
    tiny: Any, tiny_experiment: Experiment, worker: EffectWorker, together: list[Measurement]
) -> None:
    blocks = baseline_items(tiny_experiment, 32)
    unsteered = torch.stack([activations(tiny, tiny_experiment, block, 0.0) for block in blocks]).mean(dim=(0, 1, 2, 3))
    baseline = np.mean([found.mean for found in measured(worker, blocks)], axis=0)
    for found in together:
        assert found.calibration.scale > 0
        steered = activations(tiny, tiny_experiment, found.item, found.calibration.scale).mean(dim=(0, 1, 2))
        expected = (steered - unsteered).numpy()
        assert np.abs(expected).max() > 0.1
        assert np.abs(effect_of(found.mean, baseline) - expected).max() < 1e-4 * np.abs(expected).max()


def test_in_chat_the_templates_tokens_are_steered_and_count_in_the_mean_as_other_prompts_do(
    chat_experiment: Experiment, vectors: list[VectorItem]
) -> None:
    in_chat = {"prompt_format": "chat", "prompts": ("", "hi"), "length": 30}
    experiment = chat_experiment.model_copy(update={"effects": chat_experiment.effects.model_copy(update=in_chat)})
    worker = EffectWorker(experiment)
    blocks = baseline_items(experiment, 32)
    unsteered = torch.stack([activations(worker.model, experiment, block, 0.0) for block in blocks]).mean(dim=(0, 1, 2, 3))
    baseline = np.mean([found.mean for found in measured(worker, blocks)], axis=0)
    (found,) = measured(worker, vectors[:1])
    every = activations(worker.model, experiment, found.item, found.calibration.scale)
    expected = (every.mean(dim=(0, 1, 2)) - unsteered).numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(effect_of(found.mean, baseline) - expected).max() < 1e-4 * np.abs(expected).max()
    assert torch.equal(every[1, 0, : len("[user]hi") + 2], every[1, 1, : len("[user]hi") + 2])


def test_a_measurement_says_how_it_was_made(worker: EffectWorker, vectors: list[VectorItem], together: list[Measurement]) -> None:
    found = together[0]
    assert found.item is vectors[0]
    assert found.mean.dtype == np.float32
    assert found.mean.shape == (64,)
    assert (found.n_rollouts, found.n_tokens) == (3 * 4, 3 * 4 * 16)
    assert found.unsteered_loss == worker.calibrator.unsteered_loss
    assert found.calibration == worker.calibrator.calibrate([torch.from_numpy(vectors[0].direction)])[0]


def test_results_come_in_the_order_of_the_items_and_do_not_depend_on_their_company(
    worker: EffectWorker, vectors: list[VectorItem], together: list[Measurement]
) -> None:
    assert [found.item for found in together] == vectors
    turned, (alone,) = measured(worker, vectors[::-1])[::-1], measured(worker, vectors[:1])
    for found, other in [*zip(together, turned, strict=True), (together[0], alone)]:
        assert np.allclose(found.mean, other.mean, rtol=1e-5, atol=1e-6)
        assert found.calibration == other.calibration
        assert found.error_variance == pytest.approx(other.error_variance, rel=1e-4)


def test_measuring_with_fewer_rows_a_step_than_a_vector_has_rollouts_gives_the_same(together: list[Measurement]) -> None:
    (found,) = measured(EffectWorker(load_experiment("tiny", [*PIN, "execution.rows=5"])), [together[0].item])
    assert np.allclose(found.mean, together[0].mean, rtol=1e-5, atol=1e-6)


def test_the_error_variance_is_the_spread_of_rollout_means_within_prompts(
    tiny: Any, tiny_experiment: Experiment, together: list[Measurement]
) -> None:
    found = together[0]
    means = activations(tiny, tiny_experiment, found.item, found.calibration.scale).mean(dim=2).double()
    prompts, rollouts, _ = means.shape
    total = torch.zeros(64, dtype=torch.float64)
    for prompt in range(prompts):
        centre = means[prompt].sum(0) / rollouts
        within = (means[prompt] - centre).square().sum(0) / (rollouts - 1)
        total += within / rollouts
    assert found.error_variance == pytest.approx((total / prompts**2).mean().item(), rel=1e-4)


def test_the_error_variance_of_one_rollout_a_prompt_is_the_spread_over_prompts(tiny: Any, vectors: list[VectorItem]) -> None:
    experiment = load_experiment("tiny", [*PIN, "effects.rollouts=1", "effects.fixed_scale=4"])
    (found,) = measured(EffectWorker(experiment), vectors[:1])
    acts = activations(tiny, experiment, vectors[0], 4.0)
    for of_prompt, prompt in zip(acts, experiment.effects.prompts, strict=True):
        of_prompt[:, : len(prompt) + 1] = 0
    means = acts.mean(dim=2).flatten(0, 1).double()
    spread = (means - means.mean(0)).square().sum(0) / (len(means) - 1)
    assert found.error_variance == pytest.approx((spread / len(means)).mean().item(), rel=1e-4)


def test_baseline_blocks_are_unsteered_and_have_their_own_seeds(
    tiny: Any, tiny_experiment: Experiment, worker: EffectWorker
) -> None:
    blocks = baseline_items(tiny_experiment, 32)
    assert [(block.source, block.index) for block in blocks] == [(BASELINE, 0), (BASELINE, 1)]
    first, second = measured(worker, blocks)
    assert (first.calibration.scale, first.calibration.loss) == (0.0, worker.calibrator.unsteered_loss)
    assert not np.allclose(first.mean, second.mean)


def test_another_run_seed_draws_other_texts_for_the_same_vector(together: list[Measurement]) -> None:
    (other,) = measured(EffectWorker(load_experiment("tiny", [*PIN, "seed=1"])), [together[0].item])
    assert other.calibration == together[0].calibration
    assert not np.allclose(other.mean, together[0].mean)


def test_the_row_of_an_effect_holds_the_difference_and_both_standard_errors(
    together: list[Measurement],
) -> None:
    found = together[:2]
    baseline = np.linspace(0, 3, 64, dtype=np.float32)
    table = effect_rows(found, Baseline(baseline, 0.25, None))
    effects = table.column("effect").combine_chunks().to_numpy_ndarray()
    assert effects.dtype == np.float16
    assert np.allclose(effects, np.stack([one.mean - baseline for one in found]), rtol=1e-3, atol=1e-3)
    assert np.array_equal(
        table.column("vector").combine_chunks().to_numpy_ndarray(), np.stack([one.item.direction for one in found])
    )
    expected = [np.sqrt(one.error_variance + 0.25) for one in found]
    assert table.column("standard_error").to_pylist() == pytest.approx(expected)
    assert table.column("scale").to_pylist() == [one.calibration.scale for one in found]


def test_an_effect_beyond_the_range_of_float16_is_refused(together: list[Measurement]) -> None:
    with pytest.raises(InputError, match="exceeds 65504"):
        effect_rows(together[:1], Baseline(np.full(64, -7e4, dtype=np.float32), 0.0, None))


def test_a_vector_that_breaks_the_model_fails_alone() -> None:
    experiment = load_experiment("tiny", ["model.dtype=float16", "model.device=cpu", "effects.fixed_scale=3e5"])
    worker = EffectWorker(experiment)
    broken, sound = next(vector_items(experiment, 32)), baseline_items(experiment, 32)[0]
    failure, measured = worker.measure([broken, sound])
    assert isinstance(failure, Failure)
    assert "not finite at scale 300000" in failure.reason
    assert isinstance(measured, Measurement)
    assert np.array_equal(measured.mean, worker.measure([sound, sound])[1].mean)


def test_a_vector_may_use_the_noise_of_one_block_of_the_baseline(vectors: list[VectorItem]) -> None:
    worker = EffectWorker(load_experiment("tiny", [*PIN, "effects.noise=baseline", "effects.fixed_scale=1e-6"]))
    blocks = baseline_items(worker.experiment, 32)
    unsteered = {block.vector_id: block_mean.mean for block, block_mean in zip(blocks, measured(worker, blocks), strict=True)}
    used = set()
    for item, found in zip(vectors, measured(worker, vectors), strict=True):
        owner = noise_owner(item, worker.experiment.effects)
        assert np.allclose(found.mean, unsteered[owner], rtol=1e-4, atol=1e-5)
        used.add(owner)
    assert used <= unsteered.keys()
    own = load_experiment("tiny", PIN).effects
    assert [noise_owner(item, own) for item in (*vectors, *blocks)] == [item.vector_id for item in (*vectors, *blocks)]


def test_standard_errors_of_every_feature_are_kept_where_asked_for(together: list[Measurement]) -> None:
    worker = EffectWorker(load_experiment("tiny", [*PIN, "effects.standard_errors=features"]))
    (found,) = measured(worker, [together[0].item])
    assert together[0].feature_error_variance is None
    assert found.feature_error_variance is not None
    assert found.feature_error_variance.mean() == pytest.approx(together[0].error_variance, rel=1e-4)
    of_baseline = np.linspace(0, 1, 64, dtype=np.float32)
    row = effect_rows([found], Baseline(found.mean * 0, float(of_baseline.mean()), of_baseline))
    expected = np.sqrt(found.feature_error_variance + of_baseline)
    assert np.allclose(row.column("standard_errors").combine_chunks().to_numpy_ndarray()[0], expected, rtol=1e-3, atol=1e-4)
    assert "standard_errors" not in effect_rows(together[:1], Baseline(found.mean, 0.1, None)).column_names


def test_the_sae_encodes_in_float32_unless_told_otherwise(together: list[Measurement]) -> None:
    worker = EffectWorker(load_experiment("tiny", [*PIN, "sae.dtype=bfloat16"]))
    assert worker.sae.W_dec.dtype == torch.bfloat16
    (coarse,) = measured(worker, [together[0].item])
    assert coarse.mean.dtype == np.float32
    assert np.allclose(coarse.mean, together[0].mean, rtol=0.1, atol=0.1)
    assert not np.allclose(coarse.mean, together[0].mean, rtol=1e-5, atol=1e-6)
    assert EffectWorker(load_experiment("tiny", ["model.dtype=bfloat16", "model.device=cpu"])).sae.W_dec.dtype == torch.float32


def test_rows_of_one_vector_are_the_same_to_the_bit_in_batches_of_any_company(
    worker: EffectWorker, vectors: list[VectorItem], together: list[Measurement]
) -> None:
    blocks = baseline_items(worker.experiment, 32)
    mixed = measured(worker, [blocks[0], vectors[2], vectors[0], blocks[1], vectors[1]])
    by_id = {found.item.vector_id: found for found in mixed}
    for found in together:
        assert np.array_equal(found.mean, by_id[found.item.vector_id].mean)
        assert found.calibration == by_id[found.item.vector_id].calibration
