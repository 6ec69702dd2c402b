"""Part `effects`: what many vectors do to the features of the SAE, measured in this process, by the settings of the preset.

Vectors come in a mixed order, so those measured so far are a fair sample of all.
"""

from __future__ import annotations

import importlib.util
import random as chance
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from torch import Tensor

from assets.language_model import LanguageModel
from assets.parts import Build, Need, Progress, digest, whole
from assets.plain_sae import PlainSae
from assets.settings import Settings
from saets import sae
from saets.effects.sources import vector_items
from saets.effects.worker import EffectWorker, Failure, Measurement, baseline_items, rollouts_per_vector
from saets.engine.calibration import Calibration, Calibrator
from saets.errors import InputError
from saets.experiment.config import BASELINE, Experiment, packaged
from saets.experiment.loading import effect_settings, load_experiment
from saets.hooks import layer_of
from saets.records import VectorItem, vector_id
from saets.run_folder.rows import measurement_rows, measurements_of

PRESET = "smollm2"

FILE_TOKENS = 54_000
"""Of the rollouts that are measured together and kept in one file, which is what a kill costs: a minute or two of two cores."""


def need(settings: Settings) -> Need:
    """Mean activations and vectors, four bytes a number."""
    d_sae, effects = settings.training.d_sae, settings.effects
    return Need(disk=4.0 * (d_sae + 576) * (effects.decoder + effects.mixtures + effects.random), memory=5e9)


def preset_settings(build: Build) -> Mapping[str, Any]:
    """What else decides the result: the preset's settings of model and effects, and the text on which scales are calibrated.

    Which vectors it measures live decides nothing about those that are measured here.
    """
    settings = effect_settings(load_experiment(PRESET))
    text = packaged(settings["effects"]["calibration_text"]).read_text(encoding="utf-8")
    return {**settings, "calibration": digest([text])}


def settings_and_live_rows(build: Build) -> list[Any]:
    """What else decides which vectors are measured, and how."""
    return [preset_settings(build), live_rows()]


def live_rows() -> list[int]:
    """Decoder rows that the preset measures in the user's run."""
    sources = load_experiment(PRESET).effects.sources
    return sorted(row for source in sources for row in getattr(source, "rows", None) or ())


def experiment_of(build: Build, folder: Path) -> Experiment:
    """The preset with the SAE in `folder`, and the vectors to ship in place of those that it measures live."""
    effects, layer = build.settings.effects, build.settings.training.layer
    live = live_rows()
    rows = [row for row in decoder_rows(build) if row not in live][: effects.decoder]
    return preset_with(folder, layer, rows=sorted(rows), mixtures=effects.mixtures, random=effects.random, at_once=effects.rows)


def decoder_rows(build: Build) -> list[int]:
    """All of them, in an order of chance."""
    order = np.random.default_rng(build.settings.subject.seed).permutation(build.settings.training.d_sae)
    return [int(row) for row in order]


def preset_with(
    folder: Path, layer: int, *, rows: Sequence[int], mixtures: int, random: int, at_once: int, others: Sequence[str] = ()
) -> Experiment:
    """The preset with another SAE, layer and vectors: these decoder rows, so many mixtures and random ones."""
    sources = [f"{{kind = 'decoder', rows = {list(rows)}}}"]
    sources += [f"{{kind = '{kind}', count = {n}}}" for kind, n in (("mixture", mixtures), ("random", random)) if n]
    return load_experiment(
        PRESET,
        [
            f"hook_name='blocks.{layer}.hook_resid_post'",
            f"sae.path='{folder}'",
            f"effects.sources=[{', '.join(sources)}]",
            f"execution.rows={at_once}",
            *others,
        ],
    )


def make(build: Build, folder: Path) -> Mapping[str, Any]:
    """Files of some measurements each."""
    experiment = experiment_of(build, build.folder("sae") / "sae")
    dtype = measure(build, experiment, folder)
    outcomes = Counter(found.calibration.outcome for found in measurements(folder) if found.item.source != BASELINE)
    return {
        "vectors": sum(outcomes.values()),
        "capped": outcomes["capped"],
        "rollouts_a_vector": rollouts_per_vector(experiment.effects),
        "dtype": dtype,
    }


def measure(build: Build, experiment: Experiment, folder: Path, known: dict[str, Calibration] | None = None) -> str:
    """Measure the baseline and all vectors of the experiment into `folder`, those that are not there yet; the model's precision.

    A vector that cannot be measured is named and left out. Scales in `known`, by vector, are not looked for again, and those that
    are found are added to it: they depend on the model, the hook and the rule, and not on rollouts.

    Raises:
        InputError: a block of the baseline, or all of the vectors measured together, cannot be measured.
    """
    if importlib.util.find_spec("sae_lens") is None:
        sae.LOADERS["folder"] = lambda spec, d_model: PlainSae(Path(str(spec.path)))
    loaded, settings = LanguageModel.load(build), experiment.effects
    engine = loaded.engine(layer_of(experiment.hook_name), top_k=settings.top_k, temperature=settings.temperature)
    wanted = [*baseline_items(experiment, engine.decoder.d_model), *_vectors(experiment, engine.decoder.d_model)]
    files = sorted(folder.glob("measured-*.parquet"))
    there = {one for file in files for one in pq.read_table(file, columns=["vector_id"])["vector_id"].to_pylist()}
    items = [item for item in wanted if item.vector_id not in there]
    if items:
        worker = EffectWorker(experiment, engine=engine)
        if known is not None:
            worker.calibrator = Remembering(worker.calibrator, known)
        progress = Progress("effects, vectors", len(wanted), len(wanted) - len(items))
    at_once = max(1, FILE_TOKENS // (rollouts_per_vector(settings) * settings.length))
    first = 1 + max((int(file.stem.rpartition("-")[2]) for file in files), default=-1)
    for number, start in enumerate(range(0, len(items), at_once), start=first):
        found = _only_measurements(worker.measure(items[start : start + at_once]))
        path = folder / f"measured-{number:06d}.parquet"
        whole(path, lambda path, found=found: pq.write_table(measurement_rows(found), path))
        progress.at(len(wanted) - len(items) + start + at_once)
    return str(engine.dtype).removeprefix("torch.")


class Remembering:
    """A calibrator that asks another one only for scales that are not known."""

    def __init__(self, calibrator: Calibrator, known: dict[str, Calibration]) -> None:
        self._calibrator, self._known = calibrator, known
        self.unsteered_loss = calibrator.unsteered_loss

    def calibrate(self, directions: Sequence[Tensor]) -> list[Calibration]:
        """The scale of each unit vector."""
        ids = [vector_id(direction.numpy()) for direction in directions]
        new = {name: direction for name, direction in zip(ids, directions, strict=True) if name not in self._known}
        self._known.update(zip(new, self._calibrator.calibrate(list(new.values())), strict=True))
        return [self._known[name] for name in ids]


def _only_measurements(results: Sequence[Measurement | Failure]) -> list[Measurement]:
    failures = [result for result in results if isinstance(result, Failure)]
    for failure in failures:
        print(f"effects: {failure.item.source} {failure.item.index} left out: {failure.reason}", file=sys.stderr)
    if len(failures) == len(results) or any(failure.item.source == BASELINE for failure in failures):
        raise InputError(f"the baseline or all of {len(results)} vectors could not be measured: {failures[0].reason}")
    return [result for result in results if isinstance(result, Measurement)]


def measurements(folder: Path) -> Iterator[Measurement]:
    """All measurements, the baseline's blocks among them."""
    for path in sorted(folder.glob("measured-*.parquet")):
        yield from measurements_of(pq.read_table(path))


def _vectors(experiment: Experiment, d_model: int) -> list[VectorItem]:
    """Each vector once."""
    items = list({item.vector_id: item for item in vector_items(experiment, d_model)}.values())
    chance.Random(experiment.seed).shuffle(items)
    return items
