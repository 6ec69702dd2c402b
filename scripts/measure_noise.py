"""Measures on SmolLM2 what sharing sampling noise between steered and unsteered rollouts does to effects.

    python scripts/measure_noise.py [--vectors 40] [--rollouts 6] [--length 32]

Every estimate is made twice with independent noise; half the mean squared difference of the two is its error. Compared are a
vector's own noise, noise rotated over ten blocks of the baseline, that with plain pairing, and that with a control variate
(method, section 7). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import NamedTuple

import torch
from torch import Tensor

from saets.effects.sources import vector_items
from saets.effects.worker import EffectWorker
from saets.engine.batch import Row
from saets.engine.sampling import row_seed
from saets.experiment.loading import load_experiment

BLOCKS = 10
REPLICATES = 2


class Replicate(NamedTuple):
    """One independent measurement; rollout means of feature activations."""

    own: Tensor
    """[vectors, rollouts, d_sae], each vector with noise of its own."""
    shared: Tensor
    """The same, vector i with the noise of block i mod 10."""
    baseline: Tensor
    """[blocks, rollouts, d_sae], unsteered."""

    def partner(self) -> Tensor:
        """For each vector the unsteered rollouts of its noise."""
        return self.baseline[torch.arange(len(self.shared)) % BLOCKS]


def main() -> None:
    """Measure, print a table, and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=40)
    parser.add_argument("--rollouts", type=int, default=6, help="a prompt")
    parser.add_argument("--length", type=int, default=32)
    options = parser.parse_args()
    rows = list(range(0, 4096, 4096 // options.vectors))[: options.vectors]
    settings = [f"effects.sources=[{{rows={rows}}}]", f"effects.rollouts={options.rollouts}", f"effects.length={options.length}"]
    experiment = load_experiment("smollm2", [*settings, "execution.rows='auto'", "execution.actors=1"])
    worker = EffectWorker(experiment)
    items = list(vector_items(experiment, worker.model.cfg.d_model))
    calibrations = worker.calibrator.calibrate([torch.from_numpy(item.direction) for item in items])
    vectors = torch.stack([torch.from_numpy(i.direction) * c.scale for i, c in zip(items, calibrations, strict=True)])
    zero = torch.zeros(1, vectors.shape[1])
    started, done, total = time.monotonic(), 0, REPLICATES * (2 * len(items) + BLOCKS)

    def rollouts(owner: str, replicate: int, vector: Tensor) -> Tensor:
        nonlocal done
        prompts = experiment.effects.prompts
        batch = [
            Row(prompt, row_seed("noise", replicate, owner, which, sample), 0)
            for which, prompt in enumerate(prompts)
            for sample in range(options.rollouts)
        ]
        sums = worker.engine.run(batch, vector, options.length, worker._encode).sums
        assert sums is not None
        done += 1
        if sys.stderr.isatty():
            left = (time.monotonic() - started) / done * (total - done)
            print(f"\r{done} of {total} batches, {left:.0f} s left ", end="", file=sys.stderr, flush=True)
        return sums / options.length

    replicates = []
    for replicate in range(REPLICATES):
        baseline = [rollouts(f"block {block}", replicate, zero) for block in range(BLOCKS)]
        own = [rollouts(f"vector {i}", replicate, vectors[i : i + 1]) for i in range(len(items))]
        shared = [rollouts(f"block {i % BLOCKS}", replicate, vectors[i : i + 1]) for i in range(len(items))]
        replicates.append(Replicate(torch.stack(own), torch.stack(shared), torch.stack(baseline)))
    report(replicates, options, len(experiment.effects.prompts))


def report(replicates: list[Replicate], options: argparse.Namespace, prompts: int) -> None:
    """The table and the JSON object."""
    estimates = {
        "own": [r.own.mean(1) - r.baseline.mean((0, 1)) for r in replicates],
        "baseline blocks": [r.shared.mean(1) - r.baseline.mean((0, 1)) for r in replicates],
        "blocks, paired": [r.shared.mean(1) - r.partner().mean(1) for r in replicates],
        "blocks, control variate": [controlled(r, prompts) for r in replicates],
    }
    unit = error(estimates["own"])[0]
    truth = torch.stack(estimates["own"]).mean(0)
    found = {}
    print(f"{'noise':<24} {'single effect':>14} {'mean effect (b)':>16} {'about the mean (M)':>19}   error, own noise = 1")
    for name, pair in estimates.items():
        single, mean, about = error(pair)
        found[name] = {"single": single / unit, "b": mean / unit, "M": about / unit}
        print(f"{name:<24} {single / unit:>14.3f} {mean / unit:>16.4f} {about / unit:>19.3f}")
    rho = torch.stack([correlation(r, prompts) for r in replicates]).mean().item()
    signal = truth.square().mean().item()
    print(f"correlation of a steered rollout with the unsteered one of its noise: {rho:.3f}")
    print(f"squared size of an effect over its squared error, own noise: {signal / unit:.1f}")
    facts = {**vars(options), "correlation": rho, "signal_over_error": signal / unit, "error_of_own_noise_1": found}
    print(json.dumps(facts))


def error(pair: list[Tensor]) -> tuple[float, float, float]:
    """Half the mean squared difference of two estimates: of single effects, of their mean, and of effects about their mean."""
    difference = (pair[0] - pair[1]).double()
    mean = difference.mean(0)
    return tuple(0.5 * d.square().mean().item() for d in (difference, mean, difference - mean))  # type: ignore[return-value]


def within(rollouts: Tensor, prompts: int) -> Tensor:
    """Rollouts less the mean of their prompt."""
    by_prompt = rollouts.unflatten(1, (prompts, -1))
    return (by_prompt - by_prompt.mean(2, keepdim=True)).flatten(1, 2)


def moments(replicate: Replicate, prompts: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each vector and feature: covariance with the partner, the partner's variance and the steered variance."""
    steered, unsteered = within(replicate.shared, prompts), within(replicate.partner(), prompts)
    return (steered * unsteered).mean(1), unsteered.square().mean(1), steered.square().mean(1)


def controlled(replicate: Replicate, prompts: int) -> Tensor:
    """y = mean_S f_s - c - beta (mean_S f_b - c), beta a feature from the other vectors."""
    covariance, variance, _ = moments(replicate, prompts)
    others = covariance.sum(0) - covariance, variance.sum(0) - variance
    beta = torch.where(others[1] > 0, others[0] / others[1].clamp(min=1e-30), 0)
    centre = replicate.baseline.mean((0, 1))
    return replicate.shared.mean(1) - centre - beta * (replicate.partner().mean(1) - centre)


def correlation(replicate: Replicate, prompts: int) -> Tensor:
    """Over all features and vectors, weighted by variance."""
    covariance, unsteered, steered = (moment.sum() for moment in moments(replicate, prompts))
    return covariance / (unsteered * steered).sqrt()


if __name__ == "__main__":
    main()
