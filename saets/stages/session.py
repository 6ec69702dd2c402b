"""What every stage is given: an experiment, its run folder, and where to show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saets.config import Experiment, packaged
from saets.distributed.cluster import Cluster
from saets.distributed.pool import SteeringPool
from saets.errors import InputError
from saets.progress import Progress, Silent
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
        cls, experiment: Experiment, out: Path, progress: Progress | None = None, *, measure: bool = False, verbose: bool = False
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
        shipped = RunFolder(packaged(where))
        settings = shipped.manifest().get("effects", {}).get("settings")
        if settings is None or not shipped.effects.shards():
            raise InputError(f"effects.shipped names {shipped.path}, which holds no effects; leave it out or give --measure")
        different = differing_keys(settings, effect_settings(self.experiment))
        if different:
            raise InputError(
                f"the effects in {shipped.path} were measured with other settings ({'; '.join(different)}); "
                "set them back, or give --measure to fit only your own"
            )
        return shipped


def effect_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide what an effect is; rows measured with other ones never share a folder or a fit."""
    dump = experiment.model_dump(mode="json", exclude_none=True)
    return {
        "model": model_settings(experiment),
        "sae": dump["sae"],
        "hook_name": experiment.hook_name,
        "seed": experiment.seed,
        "effects": {key: value for key, value in dump["effects"].items() if key not in ("sources", "shipped")},
    }


def model_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that say which model it is; where it runs does not matter."""
    return experiment.model.model_dump(mode="json", exclude_none=True, exclude={"device", "device_map"})
