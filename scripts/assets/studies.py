"""Parts that inform a choice, by how well a fit to effects predicts vectors it has not seen; never by judged text.

`layers`: at which layer, by SAEs of one kind trained on the same tokens. `targets`: how far a vector should raise the loss.
`rollouts`: with the same tokens for all, how many rollouts a vector and of what length, for how many vectors.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from assets import measuring, training
from assets.fitting import held_out_report, moments_of
from assets.language_model import LanguageModel
from assets.parts import Build
from saets.config import BASELINE, Experiment
from saets.effects import Measurement
from saets.held_out import is_held_out
from saets.rows import Baseline

HELD_OUT = 0.2
"""Share of the vectors on which a fit is scored, where they are not others."""


def layers(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit at each layer of `residuals.layers`."""
    study, loaded = build.settings.layers, LanguageModel.load(build.settings.subject)
    found = {}
    for layer in build.settings.residuals.layers:
        sae = training.compared(build, layer) / "sae"
        experiment = _experiment(build, sae, layer, measuring.decoder_rows(build)[: study.rows], study.random)
        found[f"layer {layer}"] = _said(
            f"layer {layer}", fitted(_measured(loaded, experiment, folder / f"layer-{layer}"), experiment)
        )
    return {"fits": found}


def targets(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit at each of `targets.loss_increases`, to the same vectors at the scales that it gives."""
    study, loaded = build.settings.targets, LanguageModel.load(build.settings.subject)
    found = {}
    for increase in study.loss_increases:
        told = f"effects.loss_increase={increase}"
        experiment = _of_shipped_sae(build, measuring.decoder_rows(build)[: study.rows], study.random, told)
        name = f"loss increase {increase:g}"
        found[name] = _said(name, fitted(_measured(loaded, experiment, folder / f"increase-{increase:g}"), experiment))
    return {"fits": found}


def rollouts(build: Build, folder: Path) -> Mapping[str, Any]:
    """A fit for each number and length of rollouts, to as many vectors as the tokens allow.

    All are scored on the same other vectors, whose rollouts are as many and as long as the paper's.
    """
    study, loaded = build.settings.rollouts, LanguageModel.load(build.settings.subject)
    order = measuring.decoder_rows(build)
    told = (f"effects.rollouts={study.truth_each}", f"effects.length={study.truth_length}")
    experiment = _of_shipped_sae(build, order[: study.truth_vectors], 0, *told)
    truth, truth_baseline = parted(_measured(loaded, experiment, folder / "truth"))
    prompts, found = len(experiment.effects.prompts), {}
    for length, each in itertools.product(study.lengths, study.each):
        vectors = study.tokens // (prompts * each * length)
        rows = order[study.truth_vectors : study.truth_vectors + vectors]
        experiment = _of_shipped_sae(build, rows, 0, f"effects.rollouts={each}", f"effects.length={length}")
        name = f"{prompts * each} rollouts of {length} tokens"
        some, baseline = parted(_measured(loaded, experiment, folder / f"length-{length}-each-{each}"))
        report = held_out_report(moments_of(some, baseline), truth, truth_baseline, experiment.fit.penalties)
        found[name] = _said(name, {"vectors": len(some), **report})
    return {"tokens": study.tokens, "fits": found}


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
    mean = np.mean([block.mean for block in blocks], axis=0, dtype=np.float64).astype(np.float32)
    variance = float(np.mean([block.error_variance for block in blocks])) / len(blocks)
    return [one for one in found if one.item.source != BASELINE], Baseline(mean, variance, None)


def _measured(loaded: LanguageModel, experiment: Experiment, folder: Path) -> list[Measurement]:
    folder.mkdir(exist_ok=True)
    measuring.measure(loaded, experiment, folder)
    return list(measuring.measurements(folder))


def _of_shipped_sae(build: Build, rows: list[int], random: int, *told: str) -> Experiment:
    return _experiment(build, build.folder("sae") / "sae", build.settings.training.layer, rows, random, *told)


def _experiment(build: Build, sae: Path, layer: int, rows: list[int], random: int, *told: str) -> Experiment:
    at_once = build.settings.effects.rows
    return measuring.preset_with(sae, layer, rows=sorted(rows), mixtures=0, random=random, at_once=at_once, others=told)


def _said(name: str, report: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}: {report['vectors']} vectors, R2 {report['r2']:.4f}, cosine {report['cosine']:.4f}", file=sys.stderr)
    return report
