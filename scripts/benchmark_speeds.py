"""Measures the speeds by which `saets plan` estimates times on a CPU: what stands in [cpu] of saets/planning/machines.toml.

    python scripts/benchmark_speeds.py [--threads 1]

SmolLM2-135M by preset `smollm2`: rows decoded with the SAE, blocks above the hook, and whole texts through the bridge, each as a
share of what large matrix products reach in the same precision. Times are the CPU's, so other processes disturb them little.
The last line is one JSON object with the keys of the table.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from saets.effects.calibration_text import calibration_tokens
from saets.effects.worker import scale_rule
from saets.engine.batch import Row
from saets.engine.calibration import Calibrator
from saets.engine.rollout import RolloutEngine
from saets.experiment.loading import load_experiment
from saets.hooks import blocks_below
from saets.model import load_model
from saets.planning.sizes import ModelSize, model_size, sae_size
from saets.records import Generation
from saets.sae import load_sae
from saets.scores.measures import CompletionTokens, measure_texts

ROWS, PROMPT, TEXTS = 168, (1, 2, 3), 64
TEXT = "it's a good idea to go on with that and see what comes out of it in the end, which may be a lot of work"
LARGE = 1024


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="speeds are given for each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    experiment = load_experiment("smollm2")
    model = load_model(experiment.model)
    engine = RolloutEngine(model, experiment.hook_name)
    size, wide = model_size(experiment.model), sae_size(experiment.sae, engine.decoder.d_model)
    sae = load_sae(experiment.sae, engine.decoder.d_model)
    peaks = {name: peak(getattr(torch, name)) for name in ("bfloat16", "float32")}
    dtype = str(engine.dtype).removeprefix("torch.")

    def encode(residual: Tensor) -> Tensor:
        encoded: Tensor = sae.encode(residual)
        return encoded

    length, of_model = experiment.effects.length, peaks[dtype]
    vectors = torch.randn(4, engine.decoder.d_model, generator=torch.Generator().manual_seed(0))
    rows = [Row(PROMPT, i, i % len(vectors)) for i in range(ROWS)]
    spent = seconds(lambda: engine.run(rows, vectors, length, encode))
    steps = ROWS * (length - len(PROMPT))
    whole = size.flops(size.n_blocks, head=True, context=length / 2)
    bound = steps * (whole / of_model + wide.flops() / peaks["float32"])
    found: dict[str, Any] = {"decode": bound / spent}
    tokens = calibration_tokens(model.tokenizer, experiment.effects)
    calibrator = Calibrator(engine.decoder, tokens, scale_rule(experiment.effects))
    spent = seconds(lambda: calibrator.losses([(vectors[0] / vectors[0].norm(), 25.0)]))
    above = size.flops(size.n_blocks - blocks_below(experiment.hook_name), head=True, context=tokens.shape[1] / 2)
    found["pass"] = tokens[:, 1:].numel() * above / of_model / spent
    found["bridge"] = texts_share(model, size, of_model)
    facts = {
        **{name: value / 1e9 for name, value in peaks.items()},
        **{name: round(value, 3) for name, value in found.items()},
        "row_steps_per_second": round(steps * found["decode"] / bound, 1),
        "threads": options.threads,
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    print(json.dumps(facts))


def texts_share(model: Any, size: ModelSize, peak_rate: float) -> float:
    """Share that whole texts through the bridge reach."""
    texts = [Generation(str(i), "goal", "method", "vector", 1.0, "I think", i, 0, TEXT) for i in range(TEXTS)]
    read = CompletionTokens(model.tokenizer, [(text.prompt, text.completion) for text in texts])
    length = len(read.heads[0]) + len(read.tails[0])
    spent = seconds(lambda: measure_texts(model, texts))
    return TEXTS * length * size.flops(size.n_blocks, head=True, context=length / 2) / peak_rate / spent


def peak(dtype: torch.dtype) -> float:
    """Operations a second of large matrix products."""
    a, b = (torch.randn(LARGE, LARGE).to(dtype) for _ in range(2))
    return 4 * 2 * LARGE**3 / seconds(lambda: [a @ b for _ in range(4)])


def seconds(work: Callable[[], object], tries: int = 3) -> float:
    """The CPU's time for some work, at best, by all threads together, for each of them."""
    best = float("inf")
    for _ in range(tries):
        before = time.process_time()
        work()
        best = min(best, time.process_time() - before)
    return best


if __name__ == "__main__":
    main()
