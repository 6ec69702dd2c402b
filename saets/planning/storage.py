"""Bytes: what a run writes, and what goes over the network."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from saets.experiment.config import Experiment
from saets.experiment.model_config import Sae
from saets.methods.formulas import needs
from saets.planning.left import Left
from saets.planning.sizes import sae_size
from saets.planning.workload import Sizes
from saets.stages.evaluate import CHARACTERS_A_TOKEN

FLOAT = 4
"""Bytes of a float32, in which SAEs and approximators are stored."""

FACTS = 200
"""About the bytes of a row besides vectors, effects and text."""

GRADE = 120
"""About the bytes of one grade."""

REPLY = 4096
"""A kept reply takes a file, and that a block of the disk."""


class Bytes(NamedTuple):
    """Bytes of something."""

    what: str
    size: int


def disk(experiment: Experiment, left: Left, sizes: Sizes) -> tuple[Bytes, ...]:
    """What the run folder grows by at most: Parquet takes zeros out of effects."""
    d, n = sizes.sae.d_model, sizes.sae.d_sae
    effect = getattr(torch, experiment.effects.dtype).itemsize
    texts = left.texts.total()
    graded = texts + len(left.ungraded)
    found = [
        Bytes("effects", left.vectors * (effect * n + 4 * d + FACTS) + left.blocks * (8 * n + FACTS)),
        Bytes("approximator", 4 * (d * n + n) if left.fits or (left.published and not left.fetched) else 0),
        Bytes("vectors", len(left.pairs) * (4 * d + 4 * FACTS)),
        Bytes("texts", texts * (CHARACTERS_A_TOKEN * experiment.evaluation.new_tokens + FACTS)),
        Bytes("grades", 2 * graded * GRADE),
        Bytes("figures", left.unmeasured * 64),
        Bytes("kept replies, shared by runs", _replies(experiment, graded)),
    ]
    return tuple(one for one in found if one.size)


def _replies(experiment: Experiment, texts: int) -> int:
    if experiment.judge.kind == "local" or experiment.judge.cache is False:
        return 0
    return texts * REPLY * (2 if experiment.judge.calls == "each" else 1)


def network(experiment: Experiment, left: Left, sizes: Sizes, nodes: int) -> tuple[Bytes, ...]:
    """What is fetched where nothing is in a cache, and what goes between nodes."""
    d, n = sizes.sae.d_model, sizes.sae.d_sae
    stored = getattr(sizes.model.config, "dtype", None) or torch.float32
    model = experiment.model.loader == "transformers" and not Path(experiment.model.name).is_dir()
    fetched = left.published and not left.fetched
    rotation = fetched and any(needs(method, "Q") for method in experiment.steering.methods)
    found = [
        Bytes("model, once a node", nodes * model * sizes.model.weights * stored.itemsize),
        Bytes("SAE, once a node", nodes * _download(experiment.sae, d)),
        Bytes("SAEs that vectors are taken from", sum(_download(sae, d) for sae in _others(experiment)) if left.vectors else 0),
        Bytes("published approximator", FLOAT * ((d * n + n) + rotation * d * d) if fetched else 0),
        Bytes("measured rows, to the driver", round((1 - 1 / nodes) * FLOAT * (n + 2 * d) * (left.vectors + left.blocks))),
    ]
    return tuple(one for one in found if one.size)


def _others(experiment: Experiment) -> set[Sae]:
    """SAEs of sources, besides the one that measures."""
    named = {getattr(source, "sae", None) for source in experiment.effects.sources}
    return {sae for sae in named if sae is not None and sae != experiment.sae}


def _download(sae: Sae, d_model: int) -> int:
    return FLOAT * sae_size(sae, d_model).weights() if sae.loader == "release" else 0
