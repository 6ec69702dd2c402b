"""Actors of one node that need the same weights at the same time fetch them once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from saets.experiment.model_config import RandomWeights
from saets.model import random_llama
from tests.hub_server import Handler, Hub

LOAD = """
from saets.experiment.model_config import Model
from saets.model import load_model
print(load_model(Model(name="owner/small", dtype="float32", device="cpu")).cfg.d_model)
"""


class Slow(Handler):
    """Takes a while to send weights, so that all ask before one has them."""

    def do_GET(self) -> None:
        if "/tree/main/" in self.path:
            return self._error(404, "EntryNotFound")
        if self.path.endswith("model.safetensors"):
            time.sleep(3)
        return super().do_GET()


def test_processes_that_load_at_once_download_the_weights_once(tmp_path: Path) -> None:
    weights = random_llama(RandomWeights(), torch.float32)
    weights.model.save_pretrained(tmp_path / "small")
    weights.tokenizer.save_pretrained(tmp_path / "small")
    with Hub() as hub:
        hub.RequestHandlerClass = Slow
        hub.put("owner/small", "model", **{path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()})
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        environment = {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            **{"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
        }
        piped: dict[str, Any] = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        loading = [subprocess.Popen([sys.executable, "-c", LOAD], **piped) for _ in range(2)]
        said = [process.communicate(timeout=120) for process in loading]
        hub.shutdown()
    assert [out.strip() for out, _ in said] == ["32", "32"], said
    sent = [request for request in hub.requests if request.startswith("GET") and request.endswith("/model.safetensors")]
    assert len(sent) == 1, hub.requests
