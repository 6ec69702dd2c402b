"""Parts that inform a choice, by how well a fit to effects predicts vectors it has not seen; never by judged text.

`layers`: at which layer, by SAEs of one kind trained on the same tokens. `targets`: how far a vector should raise the loss.
`rollouts`: with the same tokens for all, how many rollouts a vector and of what length, for how many vectors.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from assets import measuring, training
from assets.fitting import held_out_report, moments_of
from assets.language_model import load_tokenizer
from assets.parts import Build, Need
from assets.settings import Settings
from saets.effects.worker import Measurement
from saets.engine.calibration import Calibration
from saets.errors import InputError
from saets.experiment.config import BASELINE, Experiment
from saets.fit.held_out import is_held_out
from saets.run_folder.rows import Baseline, measured_baseline
from saets.tokens import encode

HELD_OUT = 0.2
"""Share of the vectors on which a fit is scored, where they are not others."""


def need(settings: Settings) -> Need:
    """That of measuring, for the study that measures most."""
    return measuring.need(settings)


def layers(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit at each layer of `residuals.layers`."""
    study, found = build.settings.layers, {}
    for layer in build.settings.residuals.layers:
        sae, name = training.compared(build, layer) / "sae", f"layer {layer}"
        experiment = _experiment(build, sae, layer, measuring.decoder_rows(build)[: study.rows], study.random)
        found[name] = _said(name, fitted(_measured(build, experiment, folder / f"layer-{layer}"), experiment))
    return {"fits": found}


def targets(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit at each of `targets.loss_increases`, to the same vectors at the scales that it gives."""
    study, found = build.settings.targets, {}
    for increase in study.loss_increases:
        told, name = f"effects.loss_increase={increase}", f"loss increase {increase:g}"
        experiment = _of_shipped_sae(build, measuring.decoder_rows(build)[: study.rows], study.random, told)
        found[name] = _said(name, fitted(_measured(build, experiment, folder / f"increase-{increase:g}"), experiment))
    return {"fits": found}


def rollouts(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit for each number and length of rollouts, to as many vectors as the tokens allow.

    All are scored on the same other vectors, whose rollouts are as many and as long as the paper's. An effect is a mean over all
    positions, prompts included, where it is zero: those of shorter rollouts are scaled to the same share of free positions. The
    baseline has the same number of rollouts in all.

    Raises:
        InputError: tokens for fewer than two vectors, or for more than the SAE has rows.
    """
    study, order = build.settings.rollouts, measuring.decoder_rows(build)
    measured = {"rollouts": study.truth_each, "length": study.truth_length, "baseline_blocks": study.truth_blocks}
    told = [f"effects.{name}={value}" for name, value in measured.items()]
    experiment = _of_shipped_sae(build, order[: study.truth_vectors], 0, *told)
    prompts = [len(encode(load_tokenizer(build), prompt)) for prompt in experiment.effects.prompts]
    most = len(order) - study.truth_vectors
    for length, each in itertools.product(study.lengths, study.each):
        if not 2 <= (vectors := study.tokens // (len(prompts) * each * length)) <= most:
            raise InputError(
                f"rollouts.tokens = {study.tokens} are {vectors} vectors of {len(prompts) * each} rollouts of {length} tokens; "
                f"expected 2 to {most}, the SAE's rows less those that are predicted"
            )
    truth, truth_baseline = parted(_measured(build, experiment, folder / "truth"))
    found, scales = {}, {}
    for length, each in itertools.product(study.lengths, study.each):
        vectors = study.tokens // (len(prompts) * each * length)
        rows = order[study.truth_vectors : study.truth_vectors + vectors]
        blocks = max(2, round(study.baseline_each / each))
        of_cell = (f"effects.rollouts={each}", f"effects.length={length}", f"effects.baseline_blocks={blocks}")
        experiment = _of_shipped_sae(build, rows, 0, *of_cell)
        name = f"{len(prompts) * each} rollouts of {length} tokens"
        some, baseline = parted(_measured(build, experiment, folder / f"length-{length}-each-{each}", scales))
        scales.update({one.item.vector_id: one.calibration for one in some})
        factor = free_share(prompts, study.truth_length) / free_share(prompts, length)
        scaled = [replace(one, mean=factor * one.mean) for one in some]
        moments = moments_of(scaled, baseline._replace(mean=factor * baseline.mean))
        report = held_out_report(moments, truth, truth_baseline, experiment.fit.penalties)
        found[name] = _said(name, {"vectors": len(some), **report})
    return {"tokens": study.tokens, "fits": found}


def free_share(prompts: Sequence[int], length: int) -> float:
    """Part of a rollout's positions that are sampled, over prompts of so many tokens."""
    return 1 - sum(prompts) / len(prompts) / length


def fitted(found: list[Measurement], experiment: Experiment) -> dict[str, Any]:
    """The report of a fit to some of the vectors on the others, and the scales that were found."""
    vectors, baseline = parted(found)
    apart = is_held_out([one.item.vector_id for one in vectors], experiment.seed, HELD_OUT)
    train, held_out = ([one for one, out in zip(vectors, apart, strict=True) if out == wanted] for wanted in (False, True))
    report = held_out_report(moments_of(train, baseline), held_out, baseline, experiment.fit.penalties)
    scales = [one.calibration.scale for one in vectors]
    capped = sum(one.calibration.outcome == "capped" for one in vectors)
    return {**report, "vectors": len(vectors), "median_scale": float(np.median(scales)), "capped": capped}


def parted(found: list[Measurement]) -> tuple[list[Measurement], Baseline]:
    """The vectors, and the mean of the baseline's blocks."""
    blocks = [one for one in found if one.item.source == BASELINE]
    return [one for one in found if one.item.source != BASELINE], measured_baseline(blocks)


def _measured(
    build: Build, experiment: Experiment, folder: Path, scales: dict[str, Calibration] | None = None
) -> list[Measurement]:
    folder.mkdir(exist_ok=True)
    measuring.measure(build, experiment, folder, scales)
    return list(measuring.measurements(folder))


def _of_shipped_sae(build: Build, rows: list[int], random: int, *told: str) -> Experiment:
    return _experiment(build, build.folder("sae") / "sae", build.settings.training.layer, rows, random, *told)


def _experiment(build: Build, sae: Path, layer: int, rows: list[int], random: int, *told: str) -> Experiment:
    at_once = build.settings.effects.rows
    return measuring.preset_with(sae, layer, rows=sorted(rows), mixtures=0, random=random, at_once=at_once, others=told)


def _said(name: str, report: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}: {report['vectors']} vectors, R2 {report['r2']:.4f}, cosine {report['cosine']:.4f}", file=sys.stderr)
    return report
