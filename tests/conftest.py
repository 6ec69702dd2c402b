"""The tiny random-weight model and its experiment, in float32 on the CPU whatever the machine has, and a chat server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from saets.config import Experiment, Model
from saets.experiment import load_experiment
from saets.model import load_model
from tests.chat_server import KEY, Server

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The model as a `TransformerBridge`: 4 blocks, d_model 32, one token a byte."""
    return load_model(Model(name="tiny", loader="random", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    return load_experiment("tiny", ["model.dtype=float32", "model.device=cpu"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()
