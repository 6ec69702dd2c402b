"""The tiny random-weight model and its experiment, in float32 on the CPU whatever the machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saets.config import Experiment, Model, load_experiment
from saets.model import load_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The model as a `TransformerBridge`: 4 blocks, d_model 32, one token a byte."""
    return load_model(Model(name="tiny", loader="random", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    return load_experiment("tiny", ["model.dtype=float32", "model.device=cpu"])
