"""Measured rows in one pass, a row group at a time: what each vector does most, which vectors change a feature most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from saets.explorer.neighbours import neighbours, unit_rows
from saets.explorer.sources import HERE, Sources
from saets.explorer.strongest import Lists, of_columns, of_rows
from saets.run_folder.measured import COLUMNS
from saets.shapes import Float
from saets.terminal.progress import Progress

FACTS = ("source", "index", "scale", "loss", "unsteered_loss", "n_rollouts")
"""What is told of a vector besides, where its row has it."""

ALIKE = 2048
"""Effects are compared over so many features, those that vary most."""


class Batch(NamedTuple):
    """The rows of a row group."""

    facts: list[dict[str, Any]]
    vectors: Float[Tensor, "rows d_model"]
    effects: Float[Tensor, "rows d_sae"]
    errors: Float[Tensor, "rows d_sae"] | None
    """Standard errors of each feature, where they were kept."""


def batches(sources: Sources) -> Iterator[Batch]:
    """The measured rows, in an order that stays the same."""
    if sources.rows is None:
        return
    for part in sources.rows.parts:
        where = next((found for folder, found in sources.folders.items() if str(part.shard).startswith(folder)), HERE)
        for table in part.tables((*COLUMNS, *FACTS, "standard_errors")):
            vectors, effects = (_numbers(table, name) for name in ("vector", "effect"))
            errors = _numbers(table, "standard_errors") if "standard_errors" in table.column_names else None
            plain = [name for name in table.column_names if name not in ("vector", "effect", "standard_errors")]
            facts = [{**row, "where": where} for row in table.select(plain).to_pylist()]
            yield Batch(facts, vectors, effects, errors)


def _numbers(table: pa.Table, name: str) -> Tensor:
    return torch.tensor(table[name].combine_chunks().to_numpy_ndarray()).float()


@dataclass
class Measured:
    """What is kept of the measured rows; vectors are numbered in the order of `batches`."""

    causes: Lists
    """Of each feature the vectors that change it most."""
    facts: list[dict[str, Any]] = field(default_factory=list)
    """Of each vector; `feature` is the one whose decoder row it is, or None."""
    effects: list[Lists] = field(default_factory=list)
    """Of each vector the features that it changes most."""
    looks: list[Looks] = field(default_factory=list)
    """The vectors that are no feature's decoder row."""
    on_itself: dict[int, float] = field(default_factory=dict)
    """What the decoder rows that were measured do to their own feature."""
    alike: Lists | None = None
    """Of each vector those whose effects, less the mean effect, point the same way."""
    compared: int = 0
    """Over how many features effects are compared."""
    variance_share: float = 1.0
    """How much of the effects' variance these features hold."""


class Looks(NamedTuple):
    """What a direction looks like before anything is measured."""

    predicted: Lists | None
    """The features that it is predicted to change most."""
    nearest: Lists | None
    """The features whose decoder rows have the largest cosine with it, in size."""


def measured(sources: Sources, own_ids: Mapping[str, int], top: int, progress: Progress) -> Measured:
    """Two passes over the rows; in memory are a row group, the lists, and `ALIKE` numbers a vector."""
    d_sae, n = sources.d_sae, len(sources.rows or ())
    found, look = Measured(Lists.empty(d_sae, top)), looker(sources, top)
    total, squares = torch.zeros(2, d_sae, dtype=torch.float64)
    with progress.stage("reading effects", n, 0, "vectors") as advance:
        for batch in batches(sources):
            start = len(found.facts)
            for facts, effect in zip(batch.facts, batch.effects, strict=True):
                feature = facts["feature"] = own_ids.get(facts["vector_id"])
                if feature is not None:
                    found.on_itself[feature] = effect[feature].item()
            others = torch.tensor([facts["feature"] is None for facts in batch.facts])
            if others.any():
                found.looks.append(look(batch.vectors[others]))
            found.facts += batch.facts
            found.effects.append(of_rows(batch.effects, top, batch.errors))
            found.causes = found.causes.joined(of_columns(batch.effects, start, top, batch.errors))
            known = batch.effects.double().nan_to_num(nan=0.0)
            total += known.sum(0)
            squares += known.square().sum(0)
            advance(len(batch.facts))
    if n > 1:
        _compare(found, sources, total / n, squares / n - (total / n).square(), top, progress)
    return found


def looker(sources: Sources, top: int) -> Callable[[Float[Tensor, "rows d_model"]], Looks]:
    """Makes the `Looks` of directions."""
    approximator = sources.fit.approximator if sources.fit else None
    decoder = None if sources.decoder is None else unit_rows(sources.decoder).T

    def look(directions: Float[Tensor, "rows d_model"]) -> Looks:
        predicted = of_rows(approximator.predict(directions), top) if approximator else None
        return Looks(predicted, None if decoder is None else of_rows((unit_rows(directions) @ decoder).float(), top))

    return look


def _compare(found: Measured, sources: Sources, mean: Tensor, variance: Tensor, top: int, progress: Progress) -> None:
    chosen = variance.topk(min(ALIKE, len(variance))).indices
    found.compared, found.variance_share = len(chosen), (variance[chosen].sum() / variance.sum().clamp(min=1e-30)).item()
    kept, centre, start = unit_rows(torch.zeros(len(found.facts), len(chosen))), mean[chosen].float(), 0
    for batch in batches(sources):
        kept[start : start + len(batch.facts)] = unit_rows((batch.effects[:, chosen] - centre).nan_to_num(nan=0.0))
        start += len(batch.facts)
    with progress.stage("comparing effects", len(kept), 0, "vectors") as advance:
        found.alike = neighbours(kept, top, advance)
