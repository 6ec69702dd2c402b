"""Compares the two ways to find a vector's scale on SmolLM2: `scan`, the reference's, and `bracket`, in fewer passes.

    python scripts/measure_calibration.py [--vectors 100]

Half of the vectors are decoder rows, half random directions. The last line is one JSON object: how many vectors got another
scale, how many losses each search measured, and how often a loss fell from one grid scale to the next.
"""

from __future__ import annotations

import argparse
import json

import torch

from saets.effects.calibration_text import calibration_tokens
from saets.effects.worker import scale_rule
from saets.engine.calibration import Calibrator
from saets.engine.choice import decoder_for
from saets.experiment.loading import load_experiment
from saets.model import load_model
from saets.sae import load_sae


class Counting(Calibrator):
    """A calibrator that counts the losses it measures."""

    measured = 0

    def losses(self, steered: object) -> list[float]:
        """As its parent."""
        self.measured += len(steered)  # type: ignore[arg-type]
        return super().losses(steered)  # type: ignore[arg-type]


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100)
    options = parser.parse_args()
    experiment = load_experiment("smollm2", [f"effects.scale_grid={[20.0 * step for step in range(11)]}"])
    bridge = load_model(experiment.model)
    tokens = calibration_tokens(bridge.tokenizer, experiment.effects)
    decoder = decoder_for(bridge, experiment.hook_name)
    half = options.vectors // 2
    rows = load_sae(experiment.sae, decoder.d_model).W_dec[:: 4096 // half][:half]
    randoms = torch.randn(options.vectors - half, decoder.d_model, generator=torch.Generator().manual_seed(1))
    directions = list(torch.nn.functional.normalize(torch.cat([rows, randoms]), dim=1))
    found, measured = {}, {}
    for search in ("scan", "bracket"):
        calibrator = Counting(decoder, tokens, scale_rule(experiment.effects)._replace(search=search))
        calibrator.measured = 0
        found[search] = calibrator.calibrate(directions)
        measured[search] = calibrator.measured / options.vectors
    grid = experiment.effects.scale_grid
    curves = torch.tensor(calibrator.losses([(d, s) for d in directions for s in grid])).view(len(directions), len(grid))
    below = curves[:, :-1] < calibrator.target
    print(
        json.dumps(
            {
                "vectors": options.vectors,
                "other_scale": sum(a.scale != b.scale for a, b in zip(found["scan"], found["bracket"], strict=True)),
                "losses_scan": measured["scan"],
                "losses_bracket": measured["bracket"],
                "curves_that_fall_before_the_crossing": int(((curves.diff(dim=1) < 0) & below).any(dim=1).sum()),
                "curves_that_cross_twice": int(((curves > calibrator.target).int().diff(dim=1) < 0).any(dim=1).sum()),
            }
        )
    )


if __name__ == "__main__":
    main()
