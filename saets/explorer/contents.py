"""Everything that the page shows of a run, gathered: lists by feature and by vector, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from torch import Tensor

from saets.errors import InputError
from saets.explorer.neighbours import BLOCK, neighbours
from saets.explorer.rows import Looks, Measured, looker, measured
from saets.explorer.sources import PREDICTED, SUMMED, Sources
from saets.explorer.strongest import Lists, of_rows
from saets.terminal.progress import Progress

FEATURES = ("predicted", "targeted", "causes", "decoder_alike", "predicted_alike")
"""Lists that every feature may have."""

VECTORS = ("effects", "effects_alike", "vector_predicted", "nearest")
"""Lists that vectors may have: the first two those that were measured, the others those that are no feature's decoder row."""


@dataclass(frozen=True)
class Contents:
    """What the page shows."""

    lists: Mapping[str, Lists]
    """By names of `FEATURES` and `VECTORS`; those of which nothing is known are not there."""
    vectors: list[dict[str, Any]]
    """Facts of each vector; `name` where the run gave it one."""
    on_itself: Mapping[str, Tensor]
    """What each feature's decoder row does to it, NaN where nobody knows, and what it and SAE-TS are predicted to do to it."""
    compared: int
    variance_share: float
    """See `Measured`."""
    top: int


def gather(sources: Sources, top: int, progress: Progress) -> Contents:
    """All lists, with at most `top` entries each."""
    top = min(top, sources.d_sae)
    own_ids = sources.own_ids()
    found = measured(sources, own_ids, top, progress)
    own = {facts["feature"]: number for number, facts in enumerate(found.facts) if facts["feature"] is not None}
    lists, on_itself = _of_features(sources, top, progress)
    if found.alike is not None:
        lists["effects_alike"] = found.alike
    vectors, looks = list(found.facts), list(found.looks)
    if sources.links is not None and sources.summed is not None:
        own |= _summed(sources.summed, vectors, own_ids, own)
        lists |= _linked(sources.links, found, own, len(vectors), top)
    elif found.facts:
        lists |= {"effects": Lists.stacked(found.effects), "causes": found.causes}
    looks += _named(sources, vectors, own_ids, top)
    for name, parts in (("vector_predicted", [one.predicted for one in looks]), ("nearest", [one.nearest for one in looks])):
        known = [part for part in parts if part is not None]
        if known:
            lists[name] = Lists.stacked(known)
    on_itself["on_itself"] = torch.full((sources.d_sae,), float("nan"))
    for feature, value in (_linked_to_itself(sources.links) | found.on_itself).items():
        on_itself["on_itself"][feature] = value
    return Contents(lists, vectors, on_itself, found.compared, found.variance_share, top)


def _of_features(sources: Sources, top: int, progress: Progress) -> tuple[dict[str, Lists], dict[str, Tensor]]:
    """What is predicted of every feature, and its neighbours; what is predicted of the feature itself."""
    approximator, decoder = sources.fit.approximator if sources.fit else None, sources.decoder
    lists: dict[str, Lists] = {}
    on_itself: dict[str, Tensor] = {}
    if approximator is not None:
        directions = {"targeted": sources.targets, **({} if decoder is None else {"predicted": lambda block: decoder[block]})}
        for name, of in directions.items():
            parts, own = [], []
            with progress.stage(f"{name} effects", sources.d_sae, 0, "features") as advance:
                for start in range(0, sources.d_sae, BLOCK):
                    predicted = approximator.predict(of(slice(start, start + BLOCK)))
                    parts.append(of_rows(predicted, top))
                    own.append(predicted.diagonal(start))
                    advance(len(predicted))
            lists[name], on_itself[f"{name}_on_itself"] = Lists.stacked(parts), torch.cat(own)
    if decoder is not None:
        with progress.stage("comparing decoder rows", sources.d_sae, 0, "features") as advance:
            lists["decoder_alike"] = neighbours(decoder, top, advance)
    if decoder is not None and approximator is not None:
        # (d M) (d' M)' = d M M' d'; with M M' = V S V' these are the products of d V S^(1/2), of d_model numbers each
        values, directions = torch.linalg.eigh(approximator.M @ approximator.M.T)
        with progress.stage("comparing predicted effects", sources.d_sae, 0, "features") as advance:
            lists["predicted_alike"] = neighbours(decoder @ (directions * values.clamp(min=0).sqrt()), top, advance)
    return lists, on_itself


def _summed(
    summed: pl.DataFrame, vectors: list[dict[str, Any]], own_ids: Mapping[str, int], own: Mapping[int, int]
) -> dict[int, int]:
    """Append the decoder rows that are kept as sums; their numbers by feature."""
    found: dict[int, int] = {}
    for row in summed.iter_rows(named=True):
        feature = own_ids.get(row["vector_id"])
        if feature is not None and feature not in own:
            found[feature] = len(vectors)
            vectors.append({**row, "feature": feature, "where": SUMMED})
    return found


def _linked(links: pl.DataFrame, found: Measured, own: Mapping[int, int], vectors: int, top: int) -> dict[str, Lists]:
    """Effects and causes of the rows that were read and of those kept as sums.

    Causes end where a vector that is kept as sums might be missing: below the weakest cause that the links of a feature name.
    """
    effects, causes = Lists.empty(vectors, top), Lists.empty(len(links), top)
    if found.effects:
        read = Lists.stacked(found.effects)
        effects = Lists.stacked([read, Lists.empty(vectors - len(read.value), read.value.shape[1])])
    for feature, linked in links.select("feature", "effects").iter_rows():
        number = own.get(feature, -1)
        if linked is not None and number >= len(found.facts):
            for place, one in enumerate(linked[:top]):
                effects.which[number, place], effects.value[number, place] = one["feature"], one["effect"]
    weakest = torch.full((len(links), 1), float("inf"))
    for feature, linked in links.select("feature", "causes").iter_rows():
        weakest[feature] = min((abs(one["effect"]) for one in linked), default=0.0)
        new = [one for one in linked if own.get(one["feature"], -1) >= len(found.facts)]
        for place, one in enumerate(new[:top]):
            causes.which[feature, place], causes.value[feature, place] = own[one["feature"]], one["effect"]
    joined = found.causes.joined(causes)
    return {
        "effects": effects,
        "causes": joined._replace(value=joined.value.masked_fill(joined.value.abs() < weakest, torch.nan)),
    }


def _linked_to_itself(links: pl.DataFrame | None) -> dict[int, float]:
    found: dict[int, float] = {}
    for feature, causes, effects in () if links is None else links.select("feature", "causes", "effects").iter_rows():
        if effects is not None:
            own = [one["effect"] for one in (*causes, *effects) if one["feature"] == feature]
            found |= {feature: own[0]} if own else {}
    return found


def _named(sources: Sources, vectors: list[dict[str, Any]], own_ids: Mapping[str, int], top: int) -> list[Looks]:
    """Give the run's vectors their names; those that nobody measured are appended, and their looks returned."""
    places = {facts["vector_id"]: facts for facts in vectors}
    new: list[Tensor] = []
    for (goal, method), vector in sources.vectors.items():
        facts = places.get(vector.id)
        if facts is None:
            facts = {"vector_id": vector.id, "feature": own_ids.get(vector.id), "where": PREDICTED}
            if facts["feature"] is None:
                new.append(vector.direction)
            vectors.append(facts)
            places[vector.id] = facts
        facts.setdefault("names", []).append([goal, method])
    return [looker(sources, top)(torch.stack(new))] if new else []


def check_labels(labels: Mapping[int, str], d_sae: int) -> None:
    """Raise `InputError` where none of the labels is of a feature of this SAE."""
    if labels and not any(0 <= feature < d_sae for feature in labels):
        raise InputError(
            f"the labels are of features {min(labels)} to {max(labels)}, the SAE has 0 to {d_sae - 1}; give labels of this SAE"
        )
