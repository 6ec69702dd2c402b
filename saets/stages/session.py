"""What every stage is given: an experiment, its run folder, and where to show progress."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from saets.distributed.cluster import Cluster
from saets.distributed.pool import SteeringPool
from saets.experiment.config import Experiment
from saets.experiment.loading import effect_settings
from saets.files.storage import Where
from saets.run_folder.shipped import shipped_effects
from saets.run_folder.store import RunFolder
from saets.terminal.progress import Progress, Silent


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
        with run.locked(), Cluster(experiment.execution, experiment=experiment, out=run.path, verbose=verbose) as cluster:
            yield cls(experiment, run, cluster, SteeringPool(experiment, cluster), progress or Silent(), measure)

    @classmethod
    def looking(cls, experiment: Experiment, out: Where, *, measure: bool = False) -> Session:
        """To look at what is there: the run folder, which may be missing, is neither made nor held, and no Ray is started.

        Raises:
            InputError: the folder cannot be reached, or holds effects measured with other settings (names the keys).
        """
        run, cluster = RunFolder(out), Cluster(experiment.execution)
        run.path.check()
        run.check_effect_settings(effect_settings(experiment))
        return cls(experiment, run, cluster, SteeringPool(experiment, cluster), Silent(), measure)

    def shipped(self) -> RunFolder | None:
        """The effects that come with the experiment, where it names some and they may be used.

        Raises:
            InputError: see `shipped_effects`.
        """
        if self.measure:
            return None
        return shipped_effects(self.experiment, self.run.manifest().get("effects", {}).get("worker"))
