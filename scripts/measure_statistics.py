"""How often intervals hold what they should, and how often methods are told apart, in simulated grades.

    python scripts/measure_statistics.py [--runs 400] [--samples 16 64 256] [--flips 2000]

Scores are integers from 1 to 10 as a judge gives them, behaviour rising and coherence falling with the scale, and texts of one
sample share half of their noise across scales and methods. Coverage: how often the 95% interval of the held-out score holds its
mean over all runs. Then how often two methods differ at p < 0.05, uncorrected: equal ones, ones whose best scores are equal at
scales far apart, and ones of which one is worse by a fifth. `cpu_seconds` is what the tables take at the paper's size. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import polars as pl
from numpy.typing import NDArray

from saets.scores import statistics
from saets.scores.statistics import Half, held_out, interval, p_values, swapped_differences
from saets.scores.summary import summarise

SCALES = np.arange(10.0)
GOALS, METHODS, GRID, SAMPLES, PROMPTS = 9, 9, 16, 256, 2
"""The paper's evaluation, with all methods of the package."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def curve(turn: float, height: float) -> Curve:
    """Behaviour and coherence by scale: one comes, and then the other goes, about the scale `turn`."""
    return 0.1 + height / (1 + np.exp((turn - SCALES) * 1.5)), 0.9 / (1 + np.exp((SCALES - turn - 1) * 1.5))


CASES: dict[str, tuple[Curve, Curve]] = {
    "equal": (curve(4, 0.8), curve(4, 0.8)),
    "same_score_elsewhere": (curve(2, 0.8), curve(6, 0.8)),
    "worse_by_a_fifth": (curve(4, 0.8), curve(4, 0.65)),
}


def halves(means: Curve, samples: int, shared: NDArray[np.float64], rng: np.random.Generator) -> tuple[Half, Half]:
    """Simulated grades of one method; `shared` [2, samples / 2, 1, 2] is the noise that all methods have in common."""
    found = []
    for common in shared:
        noise = np.sqrt(0.5) * common + np.sqrt(0.5) * rng.normal(size=(len(common), len(SCALES), 2))
        scores = np.round((np.stack(means, axis=-1) + 0.25 * noise).clip(0, 1) * 9) / 9
        found.append(Half(np.concatenate([scores, np.ones((*scores.shape[:2], 1))], axis=-1), (samples // 2,)))
    return found[0], found[1]


def simulate(case: str, samples: int, runs: int) -> tuple[float, float]:
    """Coverage of the first method's interval, and the share of runs in which the two methods differ."""
    rng = np.random.default_rng(samples)
    scores, intervals, differ = [], [], []
    for run in range(runs):
        shared = rng.normal(size=(2, samples // 2, 1, 2))
        pair = [halves(means, samples, shared, rng) for means in CASES[case]]
        one, other = (held_out(*method, seed=run) for method in pair)
        assert one is not None
        assert other is not None
        assert one.resampled is not None
        scores.append(one.score)
        intervals.append(interval(one.resampled))
        p = p_values(np.array([one.score - other.score]), swapped_differences(pair, seed=run))
        differ.append(p[0] < statistics.LEVEL)
    low, high = np.array(intervals).T
    expected = np.mean(scores)
    return float(np.mean((low <= expected) & (expected <= high))), float(np.mean(differ))


def cpu_seconds_at_paper_size() -> float:
    """CPU time of the tables of goals, methods and pairs, for random grades."""
    places = itertools.product(range(GOALS), range(METHODS), range(PROMPTS), range(GRID), range(SAMPLES))
    names = ["goal", "method", "prompt", "scale", "sample"]
    texts = pl.DataFrame(list(places), schema=names, orient="row").cast(
        {"goal": pl.String, "method": pl.String, "prompt": pl.String}
    )
    scores = np.random.default_rng(0).integers(10, size=(2, len(texts))) / 9
    texts = texts.with_columns(pl.col("scale").cast(pl.Float64), behaviour=scores[0], coherence=scores[1], failed=pl.lit(False))
    start = time.process_time()
    summarise(texts.with_columns(product=pl.col("behaviour") * pl.col("coherence")))
    return time.process_time() - start


def main() -> None:
    """Simulate, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64, 256], help="even numbers")
    parser.add_argument("--flips", type=int, default=2000, help="swaps behind a p value; the package's own number is larger")
    given = parser.parse_args()
    facts: dict[str, object] = {"cpu_seconds": round(cpu_seconds_at_paper_size(), 1), "runs": given.runs}
    statistics.FLIPS = given.flips
    print(f"{'case':22} {'samples':>7} {'coverage':>8} {'differ':>7}")
    for case, samples in itertools.product(CASES, given.samples):
        coverage, differ = simulate(case, samples, given.runs)
        print(f"{case:22} {samples:7} {coverage:8.3f} {differ:7.3f}", flush=True)
        facts[f"{case}_{samples}"] = {"coverage": coverage, "differ": differ}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
