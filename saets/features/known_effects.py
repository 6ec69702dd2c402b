"""What is known of a feature's effect without measuring: rows measured before, and what an approximator predicts."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from saets.errors import InputError
from saets.experiment.config import PACKAGED, Experiment, packaged
from saets.experiment.loading import effect_settings
from saets.files.storage import Location, is_uri
from saets.fit.approximator import EffectApproximator
from saets.methods import formulas as methods
from saets.records import unit, vector_id
from saets.run_folder.fitted import fitted
from saets.run_folder.measured import ShardRows
from saets.run_folder.store import RunFolder, differing_keys, open_shard
from saets.shapes import Float

STRONGEST = 5
"""Other features that are named, by the size of their change."""


class Moved(NamedTuple):
    """A feature that a vector changes, and by how much."""

    feature: int
    effect: float


class KnownEffect(NamedTuple):
    """The effect of a feature's vector."""

    own: float | None
    """On the feature itself; None where only the strongest changes were kept and this is not among them."""
    others: list[Moved]
    """The other features that change most, strongest first."""

    @classmethod
    def of(cls, feature: int, effect: NDArray[np.floating]) -> KnownEffect:
        """From the effect on all features, [d_sae]."""
        strongest = np.argsort(-np.abs(effect), kind="stable")[: STRONGEST + 1]
        others = [Moved(int(i), float(effect[i])) for i in strongest if i != feature]
        return cls(float(effect[feature]), others[:STRONGEST])


@dataclass(frozen=True)
class KnownEffects:
    """Effects that a run folder or the package holds for an experiment, all by its effect settings."""

    experiment: Experiment
    run: RunFolder
    folders: tuple[RunFolder, ...]
    """Whose rows were measured by the experiment's own settings: the run's, then the shipped ones."""
    links: pl.DataFrame | None
    """Of each feature of the packaged SAE the strongest effects that were measured."""

    @classmethod
    def of(cls, experiment: Experiment, run: RunFolder) -> KnownEffects:
        """What there is; nothing is written. Effects by other settings than the experiment's are left alone."""
        where = experiment.effects.shipped
        shipped = None if where is None else RunFolder(where if is_uri(where) else packaged(where))
        settings = effect_settings(experiment)
        fitting = [folder for folder in (run, shipped) if folder is not None and _same(folder, settings)]
        links = packaged(str(where)).parent / "links.parquet"
        linked = shipped in fitting and str(where).startswith(PACKAGED) and links.is_file()
        return cls(experiment, run, tuple(fitting), pl.read_parquet(links).sort("feature") if linked else None)

    def measured(self, rows: Mapping[int, Float[Tensor, " d_model"]]) -> dict[int, KnownEffect]:
        """Effects of the decoder rows (by feature) that have been measured, at their calibrated scale."""
        wanted = {vector_id(unit(row.float().cpu().numpy())): feature for feature, row in rows.items() if row.any()}
        found: dict[int, KnownEffect] = {}
        for folder in self.folders:
            newest = dict(_measured(folder.effects.folder, wanted))
            of_folder = {wanted[name]: KnownEffect.of(wanted[name], effect) for name, effect in newest.items()}
            found = of_folder | found
        linked = {feature: self._linked(feature) for feature in rows if feature not in found}
        return found | {feature: effect for feature, effect in linked.items() if effect is not None}

    def _linked(self, feature: int) -> KnownEffect | None:
        row = None if self.links is None else self.links.row(feature, named=True)
        if row is None or row["effects"] is None:
            return None
        moved = [Moved(**one) for one in row["effects"]]
        causes = [Moved(**one) for one in row["causes"]]
        own = next((one.effect for one in (*moved, *causes) if one.feature == feature), None)
        return KnownEffect(own, [one for one in moved if one.feature != feature][:STRONGEST])

    def predicted(self, features: Sequence[int]) -> dict[int, KnownEffect]:
        """What SAE-TS for each feature alone is predicted to do, the feature itself included; empty without an approximator."""
        if self.approximator is None:
            return {}
        found: dict[int, KnownEffect] = {}
        for feature in features:
            target = torch.zeros_like(self.approximator.b)
            target[feature] = 1.0
            vector = methods.sae_ts(target, self.approximator, bias_weight=self.experiment.steering.bias_weight)
            found[feature] = KnownEffect.of(feature, self.approximator.predict(vector).numpy())
        return found

    @property
    def approximator(self) -> EffectApproximator | None:
        """What predicts; None where there is nothing."""
        return self._predictor[0]

    @property
    def predicted_by(self) -> str:
        """What predicts, in words."""
        return self._predictor[1]

    @functools.cached_property
    def _predictor(self) -> tuple[EffectApproximator | None, str]:
        """The run's approximator, or a fit to what is shipped, where they belong to the experiment's effect settings."""
        measured = self.run.manifest().get("effects", {}).get("settings")
        if measured is not None and self.run not in self.folders:
            return None, "nothing"
        try:
            found = fitted(self.run, self.experiment)
        except InputError:
            return None, "nothing"
        return found.approximator, f"a fit to {found.here}" if found.here else f"the approximator of {self.run.path}"


def _same(folder: RunFolder, settings: Mapping[str, object]) -> bool:
    """Whether what is in a folder was measured by these settings."""
    before = folder.manifest().get("effects", {}).get("settings")
    return before is not None and not differing_keys(before, settings)


def _measured(folder: Location, wanted: Collection[str]) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """vector_id and effect of the rows of these vectors in a folder of shards, the newest last; none is set aside."""
    for name in sorted(name for name in folder.entries() if name.endswith(".parquet")):
        with open_shard(folder / name) as file:
            ids = file.read(["vector_id"])["vector_id"].to_pylist()
        for rows in ShardRows(folder / name, np.array([one in wanted for one in ids], bool)).tables():
            yield from zip(rows["vector_id"].to_pylist(), rows["effect"].combine_chunks().to_numpy_ndarray(), strict=True)
