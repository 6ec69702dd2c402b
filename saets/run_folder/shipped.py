"""Effects that come with an experiment: where they lie, whether they belong to it, and those of them that are sums alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from saets.errors import InputError
from saets.experiment.config import Experiment, packaged
from saets.experiment.loading import effect_settings
from saets.files.storage import is_uri
from saets.fit.approximator import Moments
from saets.run_folder.store import RunFolder, differing_keys


def shipped_effects(experiment: Experiment, worker: Mapping[str, Any] | None = None) -> RunFolder | None:
    """The folder that `effects.shipped` names, where it names one.

    `worker` is what the manifest says of who measured others, where there are some.

    Raises:
        InputError: no such folder, or effects measured with other settings (names the keys) or weights.
    """
    where = experiment.effects.shipped
    if where is None:
        return None
    shipped = RunFolder(where if is_uri(where) else packaged(where))
    shipped.path.check()
    settings = shipped.manifest().get("effects", {}).get("settings")
    if settings is None or not shipped.effects.shards():
        raise InputError(
            f"effects.shipped names {shipped.path}, which holds no effects; leave it out or measure with `saets run --measure`"
        )
    different = differing_keys(settings, effect_settings(experiment))
    if different:
        raise InputError(
            f"the effects in {shipped.path} were measured with other settings ({'; '.join(different)}); "
            "set them back, or fit only your own with `saets run --measure`"
        )
    if worker:
        check_weights(shipped, worker)
    return shipped


def check_weights(there: RunFolder, worker: Mapping[str, Any]) -> None:
    """Raise `InputError` where rows in a folder were measured with other weights of the same name.

    `worker` is what the manifest says of who measured others. Weights held in another precision have another hash, and are taken
    for the same; an SAE's precision is among its settings.
    """
    before = there.manifest().get("effects", {}).get("worker", worker)
    same_precision = before["dtype"] == worker["dtype"]
    different = [
        name
        for name, comparable in (("model_hash", same_precision), ("sae_hash", True))
        if comparable and before[name] != worker[name]
    ]
    if different:
        raise InputError(
            f"{there.path} holds effects of other weights ({', '.join(different)}) under the same name; "
            "give --out a new folder, or pin model.revision"
        )


class Sums(NamedTuple):
    """Rows that come with an experiment as sums alone."""

    moments: Moments
    vector_ids: set[str]
    capped: int

    def identity(self) -> list[Any]:
        """Tells these rows, and effects of them, from others."""
        return [sorted(self.vector_ids), self.moments.yy.item(), self.moments.y.sum().item()]


def summed_rows(shipped: RunFolder) -> Sums | None:
    """Those of the shipped effects, where they have any.

    Raises:
        InputError: sums that are not of the rows that are said to be in them.
    """
    table = shipped.summed.read(["vector_id", "calibration"])
    if table is None:
        return None
    moments = Moments.load(shipped.moments)
    if moments.rows.item() != len(table):
        raise InputError(
            f"{shipped.moments} is of {moments.rows.item():.0f} rows, {shipped.summed.folder} names {len(table)}; install the "
            "package anew, or fit only your own effects with `saets run --measure`"
        )
    return Sums(moments, set(table["vector_id"]), int((table["calibration"] == "capped").sum()))
