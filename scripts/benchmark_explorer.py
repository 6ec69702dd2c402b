"""Measures what `saets explorer` takes for many vectors and features: seconds, memory, and the size of the page.

    python scripts/benchmark_explorer.py [--quick] [--vectors 50000] [--features 16384] [--d-model 2304] [--top N] [--keep PAGE]

The effects are drawn, not measured: every feature has a scale of its own, from a distribution with a long tail, and effects are
normal at that scale, in float16 as a run stores them. The approximator and the SAE's decoder are drawn too, and every feature has
a label of six words. All of it is written as a run folder first; the clock starts after that. Peak memory is the resident set of
this process. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.experiment.loading import load_experiment
from saets.explorer.contents import gather
from saets.explorer.page import page, planned_top, texts_of
from saets.explorer.sources import Sources
from saets.fit.approximator import EffectApproximator
from saets.run_folder.store import RunFolder
from saets.terminal.progress import Silent

ROWS = 2048
"""Rows written as a shard."""

WORDS = (
    "weddings",
    "names",
    "of",
    "towns",
    "code",
    "in",
    "French",
    "quotation",
    "marks",
    "sports",
    "results",
    "anger",
    "the",
    "law",
)


def tables(vectors: int, features: int, d_model: int) -> Iterator[pa.Table]:
    """Rows of random unit vectors with drawn effects."""
    draw = np.random.default_rng(0)
    scales = (0.02 * draw.lognormal(sigma=1.5, size=features)).astype(np.float32)
    for start in range(0, vectors, ROWS):
        n = min(ROWS, vectors - start)
        directions = draw.standard_normal((n, d_model), np.float32)
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        effects = (scales * draw.standard_normal((n, features), np.float32)).astype(np.float16)
        yield pa.table(
            {
                "vector_id": [f"{start + i:016x}" for i in range(n)],
                "source": ["decoder"] * n,
                "index": list(range(start, start + n)),
                "vector": pa.FixedShapeTensorArray.from_numpy_ndarray(directions),
                "scale": draw.uniform(20, 200, n),
                "loss": draw.normal(4, 0.01, n),
                "unsteered_loss": np.full(n, 3.5),
                "calibration": ["ok"] * n,
                "n_rollouts": np.full(n, 896),
                "standard_error": draw.uniform(0.01, 0.02, n),
                "effect": pa.FixedShapeTensorArray.from_numpy_ndarray(effects),
            }
        )


def written(folder: Path, vectors: int, features: int, d_model: int) -> RunFolder:
    """A run folder with these rows and an approximator."""
    run = RunFolder(folder)
    for rows in tables(vectors, features, d_model):
        run.effects.write(rows)
    draw = torch.Generator().manual_seed(1)
    M = 0.1 * torch.randn(d_model, features, generator=draw)
    EffectApproximator(M, 0.05 * torch.randn(features, generator=draw)).save(run.approximator)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, default=50000)
    parser.add_argument("--features", type=int, default=16384)
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--top", type=int)
    parser.add_argument("--quick", action="store_true", help="a few rows, to see that it runs")
    parser.add_argument("--keep", type=Path, metavar="PAGE", help="leave the page here")
    parser.add_argument("--folder", type=Path, help="where the run is made meanwhile; effects of the default size take 2 GB")
    options = parser.parse_args()
    vectors, features, d_model = (options.vectors, options.features, options.d_model) if not options.quick else (300, 128, 32)
    sizes = [f"model.random.d_model={d_model}", f"sae.d_sae={features}", "steering.goals=[]"]
    experiment = load_experiment("tiny", sizes)
    draw = np.random.default_rng(2)
    labels = {feature: " ".join(draw.choice(WORDS, 6)) for feature in range(features)}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = written(Path(folder) / "run", vectors, features, d_model)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sources = Sources.of(experiment, run)
        texts = texts_of(sources, labels)
        top = planned_top(sources, texts, options.top)
        contents = gather(sources, top, Silent())
        gathered = time.perf_counter()
        made = page(sources, contents, texts)
        done = time.perf_counter()
    if options.keep:
        options.keep.write_bytes(made)
    facts = {
        "vectors": vectors,
        "features": features,
        "d_model": d_model,
        "top": top,
        "seconds": round(done - began, 1),
        "seconds_gathering": round(gathered - began, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_memory_mb_before": round(before),
        "page_mb": round(len(made) / 1e6, 2),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
