"""Intervals, a scale chosen on one half and scored on the other, and paired tests: arrays in, numbers out (method, section 4).

What is drawn is a sample number of a prompt, with its texts of every method and scale, since these share their noise; prompts are
strata, since nobody drew them. The same draws serve every method and goal that has the same samples, so differences keep their
pairing. The score of a scale is mean(behaviour) * mean(coherence) over its graded texts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
"""Resamples behind every interval."""

PERCENTILES = (2.5, 97.5)
"""Bounds of every interval: 95%."""

FLIPS = 20_000
"""Swaps behind every p value; the smallest, 1 in 20,001, survives a correction for a thousand tests."""

LEVEL = 0.05
"""Chance, over all tests of a table together, that any difference is called one where there is none."""

_FLIPS_AT_ONCE = 500
_ROUNDING = 1e-12
"""Two statistics nearer than this are equal."""


Spread = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], list[Any]]
"""`spread(work, items)` gives `work(*item)` for each item, in order; where it is done is its own affair."""


def one_by_one(work: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
    """A `Spread` in this process."""
    return [work(*item) for item in items]


class Half(NamedTuple):
    """The even or the odd samples of one goal and method."""

    cells: NDArray[np.float64]
    """[samples, scales, 3]: behaviour, coherence, 1, or zeros where there is no graded text. Samples are sorted by prompt."""
    strata: tuple[int, ...]
    """How many of the samples belong to each prompt; sums to the samples."""


class Choice(NamedTuple):
    """Outcome of choosing on one half and scoring on the other, for each of R resamples."""

    score: NDArray[np.float64]
    """Mean of the two ways, [R]; NaN where no scale has texts in both halves."""
    even: NDArray[np.intp]
    """Column of the scale chosen on the even samples, [R]."""
    odd: NDArray[np.intp]


class HeldOut(NamedTuple):
    """The held-out score of one goal and method."""

    score: float
    even: int
    """Column of the scale chosen on the even samples."""
    odd: int
    resampled: NDArray[np.float64] | None
    """The score in each resample, the scales chosen anew, [RESAMPLES]; None with fewer than two samples in a half."""


@functools.lru_cache(maxsize=16)
def draws(strata: tuple[int, ...], seed: int, stream: int = 0) -> NDArray[np.float64]:
    """How often each sample is drawn in each resample, [RESAMPLES, samples]; as many of a stratum as it has.

    The draws depend on these sizes and the seeds alone, so an interval does not change when other goals or methods are added.
    """
    drawn = [_stratum(size, seed, stream, number) for number, size in enumerate(strata)]
    counts = np.concatenate(drawn, axis=1)
    counts.setflags(write=False)
    return counts


def _stratum(size: int, seed: int, stream: int, number: int) -> NDArray[np.float64]:
    picked = np.random.default_rng((seed, stream, number, size)).integers(size, size=(RESAMPLES, size))
    flat = picked + size * np.arange(RESAMPLES)[:, None]
    return np.bincount(flat.ravel(), minlength=RESAMPLES * size).reshape(RESAMPLES, size).astype(np.float64)


def interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    """The 95% percentile interval of a figure's resamples [R]; those in which it could not be computed (NaN) are left out."""
    low, high = np.nanpercentile(resampled, PERCENTILES)
    return float(low), float(high)


def products(weights: NDArray[np.float64], cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted mean(behaviour) * mean(coherence), [R, scales]; NaN where a scale has no text of positive weight.

    `weights` is [R, samples], `cells` as in `Half`.
    """
    return _score(np.tensordot(weights, cells, axes=1))


def _score(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums [..., 3] of behaviour, coherence and 1 to mean * mean [...]."""
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = sums[..., 0] * sums[..., 1] / sums[..., 2] ** 2
    return found


def choose(even: NDArray[np.float64], odd: NDArray[np.float64]) -> Choice:
    """Choose and score on the halves' products [R, scales], among the scales that both have; of equal ones the first."""
    usable = ~np.isnan(even * odd)
    by_even, by_odd = (np.where(usable, half, -1.0).argmax(axis=1) for half in (even, odd))
    rows = np.arange(len(even))
    score = (odd[rows, by_even] + even[rows, by_odd]) / 2
    return Choice(np.where(usable.any(axis=1), score, np.nan), by_even, by_odd)


def held_out(even: Half, odd: Half, *, seed: int) -> HeldOut | None:
    """The score of two halves with the same scales; None where no scale has graded texts in both."""
    halves = (even, odd)
    choice = choose(*(products(np.ones((1, len(half.cells))), half.cells) for half in halves))
    if np.isnan(choice.score[0]):
        return None
    resampled = None
    if all(half.cells[..., 2].any(axis=1).sum() > 1 for half in halves):
        drawn = (products(draws(half.strata, seed, stream), half.cells) for stream, half in enumerate(halves))
        resampled = choose(*drawn).score
    return HeldOut(float(choice.score[0]), int(choice.even[0]), int(choice.odd[0]), resampled)


def swapped_differences(methods: Sequence[tuple[Half, Half]], *, seed: int) -> NDArray[np.float64]:
    """Differences of held-out scores where it is chance which of two methods wrote which text, [pairs, FLIPS].

    `methods` are the halves of each method of one goal, with the same samples and scales; pairs are in the order of
    `itertools.combinations`. Each time a coin decides for every sample whether the texts of the two methods change places, at all
    scales at once, and both choose their scales anew. The test is exact where the texts of two methods are exchangeable. Coins
    depend on the number of samples and the seed alone.
    """
    pairs = list(itertools.combinations(range(len(methods)), 2))
    found = np.empty((len(pairs), FLIPS))
    generators = [np.random.default_rng((seed, stream, len(half.cells))) for stream, half in enumerate(methods[0])]
    totals = [np.stack([halves[stream].cells.sum(axis=0) for halves in methods]) for stream in range(2)]
    for start in range(0, FLIPS, _FLIPS_AT_ONCE):
        part = slice(start, min(start + _FLIPS_AT_ONCE, FLIPS))
        tossed = [_tossed(methods, stream, generators[stream], part.stop - part.start) for stream in range(2)]
        for row, (one, other) in enumerate(pairs):
            swapped = [_swapped(*(sums[[one, other]] for sums in half)) for half in zip(totals, tossed, strict=True)]
            ways = [choose(*halves).score for halves in zip(*swapped, strict=True)]
            found[row, part] = ways[0] - ways[1]
    return found


def _tossed(methods: Sequence[tuple[Half, Half]], stream: int, generator: np.random.Generator, rows: int) -> NDArray[np.float64]:
    """Sums over the samples of one half, each with a random sign, [methods, rows, scales, 3]; the same signs for all methods."""
    signs = generator.integers(2, size=(rows, len(methods[0][stream].cells)), dtype=np.int8) * 2.0 - 1.0
    return np.stack([np.tensordot(signs, halves[stream].cells, axes=1) for halves in methods])


def _swapped(totals: NDArray[np.float64], tossed: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores [rows, scales] of two methods after swaps, from sums [2, scales, 3] and signed sums [2, rows, scales, 3]."""
    middle, apart = totals.sum(axis=0) / 2, (tossed[0] - tossed[1]) / 2
    one, other = (_score(middle + sign * apart) for sign in (1, -1))
    return one, other


def p_values(found: NDArray[np.float64], by_chance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Two-sided p of each difference [tests] against those by chance [tests, FLIPS]; NaN where there is no difference.

    p = (1 + how many are at least as far from 0) / (1 + FLIPS).
    """
    as_far = (np.abs(by_chance) >= np.abs(found)[:, None] - _ROUNDING).sum(axis=1)
    return np.where(np.isnan(found), np.nan, (1 + as_far) / (1 + by_chance.shape[1]))


def holm(p: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's adjusted p values, in the order given; NaN is no test and stays.

    Rejecting those below a level keeps the chance of any false rejection below it, however the tests depend on each other.
    """
    raw = np.asarray(p, dtype=np.float64)
    order = np.argsort(raw)[: int((~np.isnan(raw)).sum())]
    steps = raw[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(len(raw), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
