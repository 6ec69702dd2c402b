"""The vectors whose effects are measured: rows of decoders, mixtures of them, random directions, files, and SAE-TS vectors.

Every vector is of unit length, and is known by a hash of its numbers, so that it is measured once whatever it was called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from saets.errors import InputError
from saets.experiment.config import DecoderRows, Experiment, MixedRows, RandomVectors, TargetedVectors, VectorFile
from saets.experiment.model_config import Sae
from saets.fit.approximator import EffectApproximator
from saets.methods import formulas as methods
from saets.records import VectorItem, unit, vector_id
from saets.sae import load_sae

Found = Iterator[tuple[int | None, NDArray[np.floating]]]
"""Number within the source, and a vector of any length."""


def vector_items(experiment: Experiment, d_model: int) -> Iterator[VectorItem]:
    """The vectors of all sources, in order, made one at a time; one that two sources hold comes twice.

    Raises:
        InputError: rows outside a decoder, missing files, vectors of another width, of length zero, or with NaN or infinity.
    """
    for source in experiment.effects.sources:
        for index, vector in SOURCES[type(source)](source, experiment, d_model):
            what = f"source {source.label()!r}" if index is None else f"source {source.label()!r}, vector {index}"
            if vector.shape != (d_model,):
                raise InputError(f"{what} has shape {vector.shape}; the model's residual stream has {d_model} numbers")
            direction = unit(vector, what)
            yield VectorItem(vector_id(direction), source.label(), index, direction)


def _decoder_rows(source: DecoderRows, experiment: Experiment, d_model: int) -> Found:
    decoder = _decoder(source.sae, experiment, d_model)
    stop = len(decoder) if source.stop is None else source.stop
    rows: Sequence[int] = source.rows if source.rows is not None else range(source.start, stop)
    outside = [row for row in rows if not 0 <= row < len(decoder)]
    if outside or not rows:
        got = f"row {outside[0]}" if outside else f"no rows ({source.start} to {source.stop})"
        raise InputError(f"effects.sources asks for {got}; the SAE has rows 0 to {len(decoder) - 1}")
    for row in rows:
        yield row, decoder[row]


def _random(source: RandomVectors, experiment: Experiment, d_model: int) -> Found:
    for index in range(source.count):
        yield index, np.random.default_rng([experiment.seed, index]).standard_normal(d_model).astype(np.float32)


def _mixtures(source: MixedRows, experiment: Experiment, d_model: int) -> Found:
    decoder = _decoder(source.sae, experiment, d_model)
    if source.terms > len(decoder):
        raise InputError(f"effects.sources mixes {source.terms} rows; the SAE has {len(decoder)}")
    for index in range(source.count):
        draw = np.random.default_rng([experiment.seed, MIXTURE, index])
        rows = draw.choice(len(decoder), size=source.terms, replace=False)
        yield index, draw.random(source.terms).astype(np.float32) @ decoder[rows]


ROWS_READ = 1024
"""Vectors of a file in memory at once."""

MIXTURE = 1
"""Keeps the draws of mixtures apart from those of random vectors."""


def _file(source: VectorFile, experiment: Experiment, d_model: int) -> Found:
    if not Path(source.path).is_file():
        raise InputError(f"effects.sources names {source.path}, which is no file; expected a safetensors file of vectors")
    try:
        with safe_open(source.path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
            odd = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) not in (1, 2)]
            if odd or not shapes:
                held = odd[0] if odd else "nothing"
                raise InputError(f"{source.path} holds {held}; expected tensors [d_model] or [n, d_model]")
            yield from enumerate(row for name, shape in shapes.items() for row in _rows_of_tensor(file, name, shape))
    except SafetensorError as error:
        raise InputError(f"{source.path} is not a safetensors file: {error}") from error


def _rows_of_tensor(file: Any, name: str, shape: tuple[int, ...]) -> Iterable[NDArray[np.float32]]:
    """The rows of a tensor of a safetensors file, some at a time; a tensor [d_model] is one row."""
    if len(shape) == 1:
        yield file.get_tensor(name).float().numpy()
        return
    for start in range(0, shape[0], ROWS_READ):
        yield from file.get_slice(name)[start : start + ROWS_READ].float().numpy()


def _targeted(source: TargetedVectors, experiment: Experiment, d_model: int) -> Found:
    approximator = EffectApproximator.load(source.approximator)
    d_sae = len(approximator.b)
    for feature in source.features:
        if not 0 <= feature < d_sae:
            raise InputError(f"effects.sources targets feature {feature}; the approximator has features 0 to {d_sae - 1}")
        target = torch.zeros(d_sae)
        target[feature] = 1.0
        yield feature, methods.sae_ts(target, approximator, bias_weight=source.bias_weight).numpy()


def _decoder(sae: Sae | None, experiment: Experiment, d_model: int) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = load_sae(sae or experiment.sae, d_model).W_dec.float().numpy()
    return rows


SOURCES: dict[type, Callable[[Any, Experiment, int], Found]] = {
    DecoderRows: _decoder_rows,
    RandomVectors: _random,
    MixedRows: _mixtures,
    VectorFile: _file,
    TargetedVectors: _targeted,
}
"""What each kind of source yields; a new kind is a section in `config` and an entry here."""
