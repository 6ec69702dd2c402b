"""Measures what stage 1 costs beside the engine: orchestration, driver memory, and where more actors stop helping.

    python scripts/benchmark_scaling.py [--quick]

Everything runs through the real path: sources, Ray Dataset, actors, the driver that writes Parquet. Three measurements:

1. Overhead: one actor with a real engine (random weights) and rows of 16,384 features; the share of the time between the first
   batch and the last in which the engine did not work.
2. Driver memory: private memory of the driver while it takes and writes rows of 2,304 and 16,384 numbers, for some vectors and
   for ten times as many, from actors that compute nothing.
3. Simulation: actors that sleep instead of computing, 1 to 32 of them, and actors that answer at once with small rows and with
   whole ones, against the driver's writing alone: which of dispatch, object store and Parquet would limit. What follows for
   numbers of actors that were not run is extrapolated and called so.

The last line is one JSON object. Rows a second depend on what else the machine does; compare within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.distributed.cluster import Cluster
from saets.distributed.effects import EffectActor, measure
from saets.effects.pending import Pending
from saets.effects.worker import Failure, Measurement
from saets.experiment.config import Effects, Execution, Experiment
from saets.experiment.loading import load_experiment
from saets.records import VectorItem
from saets.run_folder.store import RunFolder
from saets.stages.effects import EffectWriter

D_MODEL, D_SAE = 2304, 16384
"""Widths of Gemma-2-2B and of the SAE that the presets use there."""

AIM = 0.03
"""Orchestration should take less than this share of the time."""

REALISTIC_BATCH = 60.0
"""Seconds a batch for the extrapolation: some dozens of vectors with 896 rollouts each on one GPU."""


class Sizes(NamedTuple):
    """How much is run."""

    d_model: int
    rollouts: int
    batches: int
    vectors: int
    """Those of the smaller memory measurement."""
    sleep: float
    actors: tuple[int, ...]
    sleeps: int
    """Batches an actor sleeps through."""
    at_once: int
    """Batches answered at once."""


FULL = Sizes(512, 32, 20, 4000, 1.0, (1, 2, 4, 8, 16, 32), 12, 200)
QUICK = Sizes(32, 4, 4, 64, 0.05, (1, 2), 3, 8)
VECTORS_A_BATCH = 32


class Timed(EffectActor):
    """Tells how long the engine worked on each batch."""

    def measure(self, items: Sequence[VectorItem]) -> list[Measurement | Failure]:
        started = time.perf_counter()
        results = super().measure(items)
        self.facts["busy_seconds"] = time.perf_counter() - started
        return results


def idle_actor(d_sae: int, sleep: float) -> type[Any]:
    """An actor class that sleeps and answers with rows of zeros; its process imports neither torch nor a model."""

    class Idle:
        def __init__(self, experiment: str, rows: int | None, board: object) -> None:
            self.d_sae, self.sleep = d_sae, sleep

        def __call__(self, batch: pa.Table) -> pa.Table:
            import time

            import numpy as np
            import pyarrow as pa

            none = pa.nulls(1, pa.large_binary())
            if not batch.column("items")[0].is_valid:
                return pa.table({"measured": none, "failed": none, "worker": [""], "error": batch.column("error")})
            items = pa.ipc.open_stream(batch.column("items")[0].as_buffer()).read_all()
            time.sleep(self.sleep)
            zeros = pa.array(np.zeros(items.num_rows))
            for name in ("error_variance", "scale", "loss", "unsteered_loss"):
                items = items.append_column(name, zeros)
            items = items.append_column("outcome", pa.array(["fixed"] * items.num_rows))
            for name in ("n_rollouts", "n_tokens"):
                items = items.append_column(name, zeros.cast(pa.int64()))
            means = np.zeros((items.num_rows, self.d_sae), np.float32)
            items = items.append_column("mean", pa.FixedShapeTensorArray.from_numpy_ndarray(means))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, items.schema) as stream:
                stream.write_table(items)
            measured = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
            return pa.table({"measured": measured, "failed": none, "worker": ["{}"], "error": pa.nulls(1, pa.string())})

    return Idle


def idle_experiment(vectors: int, actors: int) -> Experiment:
    """Random vectors in batches of 32, and actors that need hardly any of a CPU."""
    base = load_experiment("tiny", ["model.dtype=float32", "model.device=cpu"])
    effects = Effects.model_validate(
        {
            "sources": [{"kind": "random", "count": vectors}],
            "prompts": ["a"],
            "rollouts": 1,
            "fixed_scale": 1.0,
            "baseline_blocks": 1,
        }
    )
    execution = Execution(actors=actors, cpus_per_actor=0.05, rows=VECTORS_A_BATCH)
    return base.model_copy(update={"effects": effects, "execution": execution})


@contextmanager
def writer_of(experiment: Experiment) -> Iterator[EffectWriter]:
    """A writer into a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, EffectWriter(RunFolder(Path(folder)), experiment.effects) as writer:
        yield writer


def overhead(cluster: Cluster, sizes: Sizes) -> tuple[float, float]:
    """(share of the time in which the engine did not work, seconds a batch), from the first batch's end to the last's."""
    settings = [
        *("model.dtype=float32", "model.device=cpu", "execution.actors=1", f"execution.rows={4 * sizes.rollouts}"),
        f"model.random={{d_model={sizes.d_model}, n_layers=8, n_heads=8}}",
        f"sae={{loader='random', d_sae={D_SAE}}}",
        "effects.prompts=['', 'I think', 'The weather', 'Last night']",
        *(f"effects.rollouts={sizes.rollouts}", "effects.length=32"),
        f"effects.sources=[{{kind='random', count={sizes.batches}}}]",
    ]
    experiment = load_experiment("tiny", settings)
    busy, ends = [], []
    with writer_of(experiment) as writer:
        for results, facts in measure(Pending(experiment, sizes.d_model), experiment, cluster, actor=Timed):
            writer.add(result for result in results if isinstance(result, Measurement))
            ends.append(time.perf_counter())
            busy.append((facts or {})["busy_seconds"])
    return 1 - sum(busy[1:]) / (ends[-1] - ends[0]), (ends[-1] - ends[0]) / (len(ends) - 1)


def driver_memory(cluster: Cluster, vectors: int) -> float:
    """The most private memory of this process, MB, while so many vectors are measured and written."""
    experiment = idle_experiment(vectors, actors=1)
    most = 0.0
    with writer_of(experiment) as writer:
        pending = Pending(experiment, D_MODEL)
        for results, _ in measure(pending, experiment, cluster, actor=idle_actor(D_SAE, 0.0)):
            writer.add(result for result in results if isinstance(result, Measurement))
            most = max(most, private_mb())
    assert not len(pending)
    return most


def private_mb() -> float:
    """Memory of this process that it shares with no other; the object store does not count."""
    found = re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return sum(map(int, found)) / 1000


def rows_per_second(cluster: Cluster, actors: int, batches: int, d_sae: int, sleep: float) -> float:
    """Rows that arrive at the driver in a second, after each actor's first batch."""
    experiment = idle_experiment(batches * VECTORS_A_BATCH, actors)
    ends = []
    for results, _ in measure(Pending(experiment, D_MODEL), experiment, cluster, actor=idle_actor(d_sae, sleep)):
        ends.extend([time.perf_counter()] * len(results))
    skipped = actors * VECTORS_A_BATCH
    return (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])


def written_per_second(batches: int) -> float:
    """Rows that the driver turns into effects and writes in a second, as they come from the object store."""
    experiment = idle_experiment(VECTORS_A_BATCH, 1)
    import numpy as np

    from saets.engine.calibration import Calibration

    draw = np.random.default_rng(0)

    def measured(item: VectorItem) -> Measurement:
        mean = np.maximum(draw.standard_normal(D_SAE).astype(np.float32) - 0.25, 0)  # 60% of the features are zero
        return Measurement(item, mean, 0.0, None, Calibration(1.0, 1.0, "fixed"), 1.0, 1, 1)

    items = [measured(item) for item in Pending(experiment, D_MODEL)]
    with writer_of(experiment) as writer:
        writer.add(items[:1])
        started = time.perf_counter()
        for _ in range(batches):
            writer.add(items[1:])
    return batches * (len(items) - 1) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which show that it runs and no more")
    sizes = QUICK if parser.parse_args().quick else FULL
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with Cluster(Execution(cpus_per_actor=0.05)) as cluster:
        cluster.connect()
        share, seconds = overhead(cluster, sizes)
        print(f"overhead: {share:.2%} of the time at {seconds:.2f} s a batch (aim: under {AIM:.0%})")
        small = driver_memory(cluster, sizes.vectors)
        large = driver_memory(cluster, 10 * sizes.vectors)
        print(f"driver: {small:.0f} MB for {sizes.vectors:,} vectors, {large:.0f} MB for {10 * sizes.vectors:,}")
        by_actors = {
            actors: rows_per_second(cluster, actors, (sizes.sleeps + 1) * actors, D_SAE, sizes.sleep) for actors in sizes.actors
        }
        for actors, rate in by_actors.items():
            ideal = actors * VECTORS_A_BATCH / sizes.sleep
            print(f"{actors:>3} actors that sleep {sizes.sleep:g} s a batch: {rate:.1f} rows/s, {rate / ideal:.1%} of the ideal")
        dispatch = rows_per_second(cluster, 4, sizes.at_once, 1, 0.0) / VECTORS_A_BATCH
        whole = rows_per_second(cluster, 4, sizes.at_once, D_SAE, 0.0)
    written = written_per_second(sizes.at_once)
    limit = min(dispatch * VECTORS_A_BATCH, whole, written)
    supported = limit * REALISTIC_BATCH / VECTORS_A_BATCH
    print(f"dispatch: {1000 / dispatch:.1f} ms a batch of small rows", end="; ")
    print(f"object store: {whole:.0f} rows/s; Parquet: {written:.0f} rows/s")
    print(f"extrapolated, not run: at {REALISTIC_BATCH:g} s and {VECTORS_A_BATCH} vectors a batch", end=" ")
    print(f"the slowest of the three is reached with {supported:,.0f} actors")
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "overhead_fraction": share,
        "seconds_per_batch": seconds,
        "driver_mb_small": small,
        "driver_mb_large": large,
        "vectors_small": sizes.vectors,
        "rows_per_second": {str(actors): rate for actors, rate in by_actors.items()},
        "sleep_seconds": sizes.sleep,
        "vectors_per_batch": VECTORS_A_BATCH,
        "dispatch_seconds_per_batch": 1 / dispatch,
        "object_store_rows_per_second": whole,
        "parquet_rows_per_second": written,
        "extrapolated_actors": supported,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
