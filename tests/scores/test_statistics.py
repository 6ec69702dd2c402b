"""Intervals, held-out choice and paired tests against planted truths and numbers worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from saets.scores import statistics
from saets.scores.statistics import Half, choose, draws, held_out, holm, interval, p_values, products, swapped_differences

Pair = tuple[Half, Half]
RISING, FALLING = np.linspace(0.1, 0.8, 6), np.linspace(0.9, 0.3, 6)


def method(
    behaviour: NDArray[np.float64], coherence: NDArray[np.float64], samples: int, seed: int, shared: int | None = None
) -> Pair:
    """Texts with these mean scores by scale; `shared` seeds noise that texts of one sample have in common."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(shared)
    halves = []
    for _ in range(2):
        size = (samples // 2, len(behaviour), 2)
        own, both = rng.normal(size=size), common.normal(size=(size[0], 1, 2))
        scores = np.stack([behaviour, coherence], axis=-1) + 0.15 * (own if shared is None else (own + both) / np.sqrt(2))
        halves.append(Half(np.concatenate([scores.clip(0, 1), np.ones((*size[:2], 1))], axis=-1), (samples // 2,)))
    return halves[0], halves[1]


def score(pair: Pair) -> float:
    found = held_out(*pair, seed=0)
    assert found is not None
    return found.score


def difference_p(one: Pair, other: Pair) -> float:
    return float(p_values(np.array([score(one) - score(other)]), swapped_differences([one, other], seed=0))[0])


@pytest.fixture
def few_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for a test at the level of 5%."""
    monkeypatch.setattr(statistics, "FLIPS", 1000)


def test_every_stratum_is_drawn_from_itself() -> None:
    counts = draws((3, 5), seed=1)
    assert counts.shape == (statistics.RESAMPLES, 8)
    assert (counts[:, :3].sum(axis=1) == 3).all()
    assert (counts[:, 3:].sum(axis=1) == 5).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(8), abs=0.1)
    assert not np.array_equal(counts, draws((3, 5), seed=2))


def test_a_held_out_score_by_hand() -> None:
    # Two scales; even samples do better at the first, odd ones at the second.
    even = Half(np.array([[[0.8, 0.5, 1], [0.5, 0.5, 1]]]), (1,))
    odd = Half(np.array([[[0.2, 0.5, 1], [0.6, 1.0, 1]]]), (1,))
    found = held_out(even, odd, seed=0)
    assert found is not None
    assert (found.even, found.odd, found.resampled) == (0, 1, None)
    assert found.score == pytest.approx((0.1 + 0.25) / 2)


def test_a_scale_without_graded_texts_in_one_half_is_never_chosen() -> None:
    even = Half(np.array([[[0.9, 1, 1], [0.2, 0.5, 1]]]), (1,))
    odd = Half(np.array([[[0, 0, 0], [0.2, 0.5, 1]]]), (1,))
    found = held_out(even, odd, seed=0)
    assert found is not None
    assert (found.even, found.odd, found.score) == (1, 1, pytest.approx(0.1))
    nothing = Half(np.zeros((1, 2, 3)), (1,))
    assert held_out(even, nothing, seed=0) is None


def covered(samples: int, runs: int) -> Iterator[tuple[float, tuple[float, float]]]:
    for seed in range(runs):
        found = held_out(*method(RISING, FALLING, samples, seed), seed=seed)
        assert found is not None
        assert found.resampled is not None
        yield found.score, interval(found.resampled)


@pytest.mark.parametrize("samples", [32, 128])
def test_an_interval_with_the_choice_redone_covers_the_expected_score_at_least_95_times_in_100(samples: int) -> None:
    scores, intervals = zip(*covered(samples, 200), strict=True)
    low, high = np.array(intervals).T
    assert np.mean((low <= np.mean(scores)) & (np.mean(scores) <= high)) >= 0.93
    assert np.mean(high - low) < 2 * 1.96 * 1.6 * np.std(scores), "wide enough, and not much wider"


def test_on_pure_noise_the_held_out_score_is_unbiased_and_the_maximum_is_not() -> None:
    flat = np.full(12, 0.5)
    runs = [method(flat, flat, 40, seed) for seed in range(300)]
    scores = [score(pair) for pair in runs]
    best = [products(np.ones((1, 40)), np.concatenate([half.cells for half in pair])).max() for pair in runs]
    error = np.std(scores) / np.sqrt(len(runs))
    assert np.mean(scores) == pytest.approx(0.25, abs=4 * error)
    assert np.mean(best) > 0.25 + 10 * error


def test_two_methods_that_are_equal_are_told_apart_at_the_nominal_rate(few_flips: None) -> None:
    p = [difference_p(*(method(RISING, FALLING, 32, 2 * seed + which, shared=seed) for which in range(2))) for seed in range(400)]
    assert 0.025 <= np.mean(np.array(p) < 0.05) <= 0.08
    assert np.mean(np.array(p) < 0.5) == pytest.approx(0.5, abs=0.08)


def test_a_planted_difference_is_found_the_more_surely_the_more_samples_there_are(few_flips: None) -> None:
    def power(samples: int) -> float:
        pairs = [
            (method(RISING, FALLING, samples, seed), method(RISING - 0.1, FALLING, samples, 500 + seed)) for seed in range(40)
        ]
        return float(np.mean([difference_p(*pair) < 0.05 for pair in pairs]))

    assert power(128) > 0.75 > power(16)


def test_the_same_texts_are_no_difference() -> None:
    one = method(RISING, FALLING, 16, 0)
    assert np.abs(swapped_differences([one, one], seed=0)).max() < 1e-12
    assert difference_p(one, one) == 1


def test_swaps_by_hand() -> None:
    # One sample a half and one scale: four equally likely swaps of two differences of 0.3 and 0.1.
    def one_text(even: float, odd: float) -> Pair:
        return Half(np.array([[[even, 1, 1]]]), (1,)), Half(np.array([[[odd, 1, 1]]]), (1,))

    found = swapped_differences([one_text(0.5, 0.4), one_text(0.2, 0.3)], seed=3)[0]
    values, counts = np.unique(found.round(9), return_counts=True)
    assert values == pytest.approx([-0.2, -0.1, 0.1, 0.2])
    assert counts / len(found) == pytest.approx([0.25] * 4, abs=0.02)


def by_enumeration(one: Pair, other: Pair) -> float:
    """The exact p of a difference of held-out scores: the share of all ways to swap samples that differ at least as much."""
    texts = [[half.cells[sample] for half in pair for sample in range(len(half.cells))] for pair in (one, other)]
    even = len(one[0].cells)

    def score_of(cells: list[NDArray[np.float64]]) -> float:
        halves = []
        for half in (cells[:even], cells[even:]):
            means = [sum(cell[scale] for cell in half) / len(half) for scale in range(len(half[0]))]
            halves.append([mean[0] * mean[1] for mean in means])
        first, second = (products.index(max(products)) for products in halves)
        return (halves[1][first] + halves[0][second]) / 2

    differences = []
    for swaps in itertools.product((False, True), repeat=len(texts[0])):
        ours = [texts[swap][i] for i, swap in enumerate(swaps)]
        theirs = [texts[not swap][i] for i, swap in enumerate(swaps)]
        differences.append(score_of(ours) - score_of(theirs))
    return float(np.mean([abs(difference) >= abs(differences[0]) - 1e-12 for difference in differences]))


@pytest.mark.parametrize(("shift", "seed"), [(0.0, 0), (0.15, 1), (0.3, 2), (0.5, 3)])
def test_the_simulated_p_is_that_of_all_swaps_written_out(shift: float, seed: int) -> None:
    """Ten samples, three scales: 1,024 ways to swap."""
    pair = method(RISING[:3], FALLING[:3], 10, seed), method(RISING[:3] + shift, FALLING[:3], 10, 50 + seed)
    exact = by_enumeration(*pair)
    error = np.sqrt(exact * (1 - exact) / statistics.FLIPS)
    assert difference_p(*pair) == pytest.approx(exact, abs=4 * error + 1 / statistics.FLIPS)


def test_every_pair_is_tested_and_a_third_method_changes_nothing(few_flips: None) -> None:
    three = [method(RISING - shift, FALLING, 16, 7) for shift in (0, 0.1, 0.2)]
    together = swapped_differences(three, seed=1)
    for row, (one, other) in enumerate(itertools.combinations(three, 2)):
        assert together[row] == pytest.approx(swapped_differences([one, other], seed=1)[0], abs=1e-12)


def test_failed_texts_are_left_out_of_scores_and_swaps(few_flips: None) -> None:
    whole = method(RISING, FALLING, 40, 0)
    lost = [Half(half.cells.copy(), half.strata) for half in whole]
    lost[0].cells[3, 2] = 0
    with_failure = (lost[0], lost[1])
    products_by_hand = [
        half.cells[kept, 2, 0].mean() * half.cells[kept, 2, 1].mean()
        for half, kept in ((lost[0], np.arange(20) != 3), (lost[1], np.ones(20, bool)))
    ]
    ours = [products(np.ones((1, 20)), half.cells)[0, 2] for half in with_failure]
    assert ours == pytest.approx(products_by_hand)
    assert difference_p(whole, with_failure) > 0.5
    assert np.isfinite(swapped_differences([whole, with_failure], seed=0)).all()


def test_of_equal_scales_the_first_is_chosen() -> None:
    equal = np.array([[0.5, 0.5, 0.2]])
    assert (choose(equal, equal).even, choose(equal, equal).odd) == (0, 0)


def test_holms_correction_by_hand() -> None:
    adjusted = holm([0.01, 0.04, float("nan"), 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, float("nan"), 0.06, 0.02], nan_ok=True)
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.9, 0.9]) == pytest.approx([1, 1])
    assert len(holm([])) == 0


def test_no_difference_has_no_p() -> None:
    assert np.isnan(p_values(np.array([np.nan]), np.zeros((1, 10)))).all()
