"""The counter-based noise bit for bit, and the law of the tokens it draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saets.engine.sampling import counter_hash, gumbel, row_seed, sample_top_k

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB


def mixed(z: int) -> int:
    """SplitMix64's finaliser in Python integers."""
    z = ((z ^ (z >> 30)) * MIX_1) & MASK
    z = ((z ^ (z >> 27)) * MIX_2) & MASK
    return z ^ (z >> 31)


def unmixed(z: int) -> int:
    """The inverse of `mixed`."""

    def unshifted(value: int, bits: int) -> int:
        found = value
        for _ in range(64 // bits + 1):
            found = value ^ (found >> bits)
        return found

    z = (unshifted(z, 31) * pow(MIX_2, -1, 1 << 64)) & MASK
    z = (unshifted(z, 27) * pow(MIX_1, -1, 1 << 64)) & MASK
    return unshifted(z, 30)


def hashed(seed: int, position: int, token: int) -> int:
    h = mixed((seed + GOLDEN) & MASK)
    h = mixed((h + (position + 1) * GOLDEN) & MASK)
    return mixed((h + (token + 1) * GOLDEN) & MASK)


def int64(*values: int) -> Tensor:
    return torch.tensor([value - (1 << 64) if value >> 63 else value for value in values], dtype=torch.int64)


def seeds(what: str, n: int) -> Tensor:
    return torch.tensor([row_seed(what, i) for i in range(n)])


def drawn(logits: Tensor, what: str, n: int, *, top_k: int, temperature: float = 1.0) -> Tensor:
    """n tokens from the same logits, each row with its own seed."""
    return sample_top_k(logits.expand(n, -1), seeds(what, n), 1, top_k=top_k, temperature=temperature)


def chi_square(tokens: Tensor, probabilities: Tensor) -> float:
    """Pearson's statistic of the counts against these probabilities; no token of probability 0 may appear."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * len(tokens)
    live = expected > 0
    return ((counts - expected)[live].square() / expected[live]).sum().item()


def chi_square_bound(degrees: int) -> float:
    """Mean plus five standard deviations of a chi-square variable."""
    return degrees + 5 * math.sqrt(2 * degrees)


def test_the_noise_of_seed_1_position_2_token_3_is_the_published_check_value() -> None:
    bits = counter_hash(int64(1), int64(2), int64(3)).item()
    assert bits & MASK == 0x8568F7C4E53B5A35
    assert gumbel(int64(1), int64(2), int64(3)).item() == pytest.approx(0.306073848457, abs=5e-13)


def test_the_hash_equals_python_integers_for_any_seed_position_and_token() -> None:
    cases = [(0, 0, 0), (MASK, 31, 255_999), (1 << 63, 1, 2), (0x123456789ABCDEF0, 511, 131_071), (MASK - 7, 0, 1)]
    bits = counter_hash(*(int64(*column) for column in zip(*cases, strict=True)))
    assert [value & MASK for value in bits.tolist()] == [hashed(*case) for case in cases]


def test_the_noise_equals_its_formula() -> None:
    u = ((hashed(7, 5, 9) >> 12) + 0.5) * 2.0**-52
    assert gumbel(int64(7), int64(5), int64(9)).item() == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-12)


@pytest.mark.parametrize(("bits", "u"), [(0, 2.0**-53), (MASK, 1 - 2.0**-53)])
def test_the_noise_is_finite_where_the_hash_is_all_zeros_or_all_ones(bits: int, u: float) -> None:
    position, token = 4, 6
    h = (unmixed(bits) - (token + 1) * GOLDEN) & MASK
    h = (unmixed(h) - (position + 1) * GOLDEN) & MASK
    seed = (unmixed(h) - GOLDEN) & MASK
    assert hashed(seed, position, token) == bits
    noise = gumbel(int64(seed), int64(position), int64(token)).item()
    assert noise == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-9)
    assert math.isfinite(noise)


def test_the_noise_has_the_mean_and_variance_of_a_standard_gumbel_and_is_uncorrelated_along_each_counter() -> None:
    noise = gumbel(torch.arange(40)[:, None, None], torch.arange(50)[None, :, None], torch.arange(100)[None, None, :])
    n, variance = noise.numel(), math.pi**2 / 6
    assert noise.mean().item() == pytest.approx(0.5772156649, abs=5 * math.sqrt(variance / n))
    assert noise.var().item() == pytest.approx(variance, abs=5 * variance * math.sqrt(4.4 / n))
    for axis in range(3):
        a, b = noise.narrow(axis, 1, noise.shape[axis] - 1), noise.narrow(axis, 0, noise.shape[axis] - 1)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax_over_the_top_k_at_any_temperature(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    kept = logits >= logits.sort(descending=True).values[9]
    weights = torch.where(kept, torch.exp(logits / temperature), 0)
    tokens = drawn(logits, f"frequencies at {temperature}", 20_000, top_k=10, temperature=temperature)
    assert chi_square(tokens, weights / weights.sum()) < chi_square_bound(9)


def test_one_row_follows_the_softmax_along_its_positions() -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5]])
    seed = seeds("one row", 1)
    tokens = torch.cat([sample_top_k(logits, seed, position, top_k=3, temperature=1.0) for position in range(2000)])
    weights = torch.tensor([math.e, math.exp(0.5), 1.0, 0.0])
    assert chi_square(tokens, weights / weights.sum()) < chi_square_bound(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_tied_with_the_kth_are_all_kept_and_the_next_lower_never_drawn(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0, 1.0, 0.75, 1.0, 1.0], dtype=dtype)
    weights = torch.tensor([0.0, math.e, 0.0, math.e, math.e**2, math.e, 0.0, math.e, math.e])
    tokens = drawn(logits, f"ties in {dtype}", 4000, top_k=3)
    assert chi_square(tokens, weights / weights.sum()) < chi_square_bound(5)


def test_a_top_k_of_the_whole_vocabulary_is_the_plain_softmax() -> None:
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.9])
    weights = torch.exp(logits)
    assert chi_square(drawn(logits, "whole", 20_000, top_k=5), weights / weights.sum()) < chi_square_bound(4)


def test_a_top_k_of_one_and_a_temperature_near_zero_both_give_the_largest_logit() -> None:
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(2))
    largest = logits.argmax(dim=1)
    assert torch.equal(sample_top_k(logits, seeds("greedy", 200), 3, top_k=1, temperature=1.0), largest)
    cold = sample_top_k(logits, seeds("cold", 200), 3, top_k=20, temperature=1e-5)
    assert (cold == largest).float().mean() > 0.99


def test_a_rows_token_does_not_depend_on_the_order_or_the_company_of_its_batch() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, own = torch.randn(64, 300, generator=generator), seeds("batch", 64)
    together = sample_top_k(logits, own, 7, top_k=50, temperature=1.0)
    order = torch.randperm(64, generator=generator)
    shuffled = sample_top_k(logits[order], own[order], 7, top_k=50, temperature=1.0)
    assert torch.equal(shuffled, together[order])
    alone = [sample_top_k(logits[i : i + 1], own[i : i + 1], 7, top_k=50, temperature=1.0).item() for i in range(8)]
    assert alone == together[:8].tolist()


def test_a_token_depends_on_the_seed_and_on_the_position() -> None:
    logits, own = torch.zeros(100, 50), seeds("first", 100)
    here = sample_top_k(logits, own, 1, top_k=50, temperature=1.0)
    assert torch.equal(sample_top_k(logits, own, 1, top_k=50, temperature=1.0), here)
    assert (sample_top_k(logits, own, 2, top_k=50, temperature=1.0) != here).sum() > 80
    assert (sample_top_k(logits, seeds("second", 100), 1, top_k=50, temperature=1.0) != here).sum() > 80


def test_a_row_seed_tells_parts_their_order_their_borders_and_their_types_apart() -> None:
    variants = [("a", 1), ("a", "1"), (1, "a"), ("1", "a"), ("a", 2), ("b", 1), ("a1",), ("a", 1, ""), ("", "a", 1), ("a", "", 1)]
    assert len({row_seed(*parts) for parts in variants}) == len(variants)


def test_row_seeds_fit_int64_use_both_signs_and_stay_the_same_between_runs() -> None:
    found = [row_seed(0, "effects", "vector", which, sample) for which in range(10) for sample in range(100)]
    assert torch.tensor(found).dtype == torch.int64
    assert len(set(found)) == len(found)
    assert 400 < sum(seed < 0 for seed in found) < 600
    assert row_seed(0, "effects", "a", 1, 2) == 8069939673932139830
