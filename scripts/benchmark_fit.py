"""Measures the exact fit against the paper's Adam on the same rows, through the same Ray Train job.

    python scripts/benchmark_fit.py [--quick] [--rows 50000] [--d-model 2304] [--d-sae 6144]

The effects are a planted map plus noise of the same size, stored in float16. Both solvers fit in this process with all its
cores: ridge with the default penalties, Adam with the paper's settings (learning rate 2e-4, batches of 64, 15 epochs, a cosine
schedule). The time is end to end, from shards on disk to the held-out report; ridge's includes the choice of the penalty and the
last fit to all rows. Peak memory is that of the process that fits; Ray's object store and the processes that read are apart.

The default size is the paper's 50,000 rows x 2,304 dimensions and a slice of 6,144 of its 16,384 features, which two cores fit in
ten minutes. Features are fitted side by side, so a slice has the errors of the whole; but ridge's work on the vectors alone does
not shrink with it, so its lead is smaller than on all features.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.distributed.cluster import Cluster
from saets.distributed.fit import FitResult, fit
from saets.experiment.config import Execution, Fit
from saets.files.storage import locate
from saets.run_folder.measured import MeasuredRows
from saets.run_folder.store import Table

AIM = 20
"""Exact should be so many times as fast, with a held-out error that is no worse."""

SIGNAL = 0.1
"""Standard deviation of an effect over vectors, and that of its noise."""

TABLE_ROWS = 1024


class Sizes(NamedTuple):
    """What is fitted."""

    rows: int
    d_model: int
    d_sae: int


FULL = Sizes(50000, 2304, 6144)
QUICK = Sizes(300, 16, 32)


def tables(sizes: Sizes) -> Iterator[pa.Table]:
    """Rows of random unit vectors."""
    draw = np.random.default_rng(0)
    M = SIGNAL * draw.standard_normal((sizes.d_model, sizes.d_sae), np.float32)
    b = SIGNAL * draw.standard_normal(sizes.d_sae, np.float32)
    for start in range(0, sizes.rows, TABLE_ROWS):
        n = min(TABLE_ROWS, sizes.rows - start)
        vectors = draw.standard_normal((n, sizes.d_model), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        effects = vectors @ M + b + SIGNAL * draw.standard_normal((n, sizes.d_sae), np.float32)
        yield pa.table(
            {
                "vector_id": [f"random:{start + i}" for i in range(n)],
                "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(vectors),
                "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(effects.astype(np.float16)),
                "standard_error": np.full(n, SIGNAL),
                "calibration": ["ok"] * n,
            }
        )


class Timed(NamedTuple):
    """One fit and what it took."""

    result: FitResult
    seconds: float
    peak_mb: float


def written(sizes: Sizes, folder: Path) -> MeasuredRows:
    """The rows as shards."""
    table = Table(folder / "effects", ["vector_id"])
    for rows in tables(sizes):
        table.write(rows)
    return MeasuredRows.of([table])


def timed(rows: MeasuredRows, settings: Fit, cluster: Cluster, folder: Path) -> Timed:
    """Fit the rows, which are written before the clock starts."""
    peak, done = [memory_mb()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        result = fit(rows, settings, cluster, locate(folder / "state"), seed=0)
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return Timed(result, seconds, peak[0])


def memory_mb() -> float:
    """Memory of this process that no file or other process shares."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, which show that it runs and no more")
    for name in Sizes._fields:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    given = parser.parse_args()
    sizes = QUICK if given.quick else FULL
    sizes = sizes._replace(**{name: getattr(given, name) for name in Sizes._fields if getattr(given, name) is not None})
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with Cluster(Execution()) as cluster, tempfile.TemporaryDirectory(prefix="saets-benchmark-") as place:
        cluster.connect()
        folder = Path(place)
        timed(written(QUICK, folder / "first"), Fit(), cluster, folder)  # what happens once a process
        rows = written(sizes, folder / "all")
        found = {solver: timed(rows, Fit(solver=solver), cluster, folder) for solver in ("ridge", "adam")}
    held_out = {solver: one.result.report["held_out"] for solver, one in found.items()}
    for solver, one in found.items():
        report = held_out[solver]
        print(f"{solver}: {one.seconds:.1f} s, peak {one.peak_mb:.0f} MB, held-out MSE {report['mse']:.6g}", end="")
        print(f" ({report['mse_noise']:.6g} of noise alone), R2 {report['r2']:.4f} of at most {report['r2_ceiling']:.4f}")
    speedup = found["adam"].seconds / found["ridge"].seconds
    no_worse = held_out["ridge"]["mse"] <= held_out["adam"]["mse"]
    print(f"exact is {speedup:.1f} times as fast (aim: {AIM}), its error {'no worse' if no_worse else 'larger'}")
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **sizes._asdict(),
        **{f"seconds_{solver}": one.seconds for solver, one in found.items()},
        "speedup": speedup,
        **{f"peak_mb_{solver}": one.peak_mb for solver, one in found.items()},
        **{f"mse_{solver}": report["mse"] for solver, report in held_out.items()},
        "mse_noise": held_out["ridge"]["mse_noise"],
        "penalty": found["ridge"].result.report["penalty"],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
