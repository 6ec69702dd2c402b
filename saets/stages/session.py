"""What every stage is given: an experiment, its run folder, and where to show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saets.config import Experiment, packaged
from saets.distributed.cluster import Cluster
from saets.distributed.pool import SteeringPool
from saets.errors import InputError
from saets.experiment import effect_settings
from saets.progress import Progress, Silent
from saets.storage import Where, is_uri
from saets.store import RunFolder, differing_keys


@dataclass(frozen=True)
class Session:
    """One experiment in one run folder, on one cluster."""

    experiment: Experiment
    run: RunFolder
    cluster: Cluster
    pool: SteeringPool
    progress: Progress
    measure: bool = False
    """Fit only effects measured in this run, not those that come with the package."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, experiment: Experiment, out: Where, progress: Progress | None = None, *, measure: bool = False, verbose: bool = False
    ) -> Iterator[Session]:
        """Make or check the run folder (`RunFolder.create` says what is refused) and hold it for writing.

        Ray is started when a stage first needs it, and left at the end.
        """
        run = RunFolder.create(out, experiment, effect_settings(experiment))
        with run.locked(), Cluster(experiment.execution, verbose=verbose) as cluster:
            yield cls(experiment, run, cluster, SteeringPool(experiment, cluster), progress or Silent(), measure)

    def shipped(self) -> RunFolder | None:
        """The effects that come with the experiment, where it names some and they may be used.

        Raises:
            InputError: no such folder, or effects measured with other settings (names the keys).
        """
        where = self.experiment.effects.shipped
        if where is None or self.measure:
            return None
        shipped = RunFolder(where if is_uri(where) else packaged(where))
        shipped.path.check()
        settings = shipped.manifest().get("effects", {}).get("settings")
        if settings is None or not shipped.effects.shards():
            raise InputError(f"effects.shipped names {shipped.path}, which holds no effects; leave it out or give --measure")
        different = differing_keys(settings, effect_settings(self.experiment))
        if different:
            raise InputError(
                f"the effects in {shipped.path} were measured with other settings ({'; '.join(different)}); "
                "set them back, or give --measure to fit only your own"
            )
        worker = self.run.manifest().get("effects", {}).get("worker")
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
