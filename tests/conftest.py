"""The tiny random-weight model and its experiment, in float32 on the CPU whatever the machine has, and one of them that chats;
a chat server; a bucket; a browser."""

from __future__ import annotations

import logging
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser, find_chromium
from chat_server import KEY, Server

from saets.effects.worker import EffectWorker, Measurement, baseline_items, describe
from saets.experiment.config import Experiment
from saets.experiment.loading import effect_settings, load_experiment
from saets.experiment.model_config import Model, RandomWeights
from saets.files.storage import Location, locate
from saets.model import ByteTokenizer, load_model, random_llama
from saets.records import VectorItem, unit, vector_id
from saets.run_folder.rows import baseline_rows, effect_rows, shared_baseline
from saets.run_folder.store import RunFolder

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Any:
    """The model as a `TransformerBridge`: 4 blocks, d_model 32, one token a byte."""
    return load_model(Model(name="tiny", loader="random", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def tiny_experiment() -> Experiment:
    return load_experiment("tiny", ["model.dtype=float32", "model.device=cpu"])


@pytest.fixture(scope="session")
def measured(tiny: Any, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run folder of the tiny experiment with its baseline and the effects of 40 random vectors; not fitted."""
    worker = EffectWorker(tiny_experiment)
    settings = effect_settings(tiny_experiment)
    run = RunFolder.create(tmp_path_factory.mktemp("measured") / "run", tiny_experiment, settings)
    run.update_stage("effects", {"worker": describe(worker)})
    blocks = [found for found in worker.measure(baseline_items(tiny_experiment, 32)) if isinstance(found, Measurement)]
    run.baseline.write(baseline_rows(blocks))
    drawn = [unit(np.random.default_rng(i).standard_normal(32)) for i in range(40)]
    items = [VectorItem(vector_id(direction), "random", i, direction) for i, direction in enumerate(drawn)]
    found = [one for one in worker.measure(items) if isinstance(one, Measurement)]
    run.effects.write(effect_rows(found, shared_baseline(run.baseline)))
    return run


CHAT_TEMPLATE = (
    "{% for turn in messages %}{% if loop.first %}<bos>{% endif %}"
    "[{{ turn['role'] }}]{{ turn['content'] | trim }}<end>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_tokenizer() -> Any:
    """The byte tokenizer with a chat template, whose turns end in `<end>`; that is not its EOS token."""
    tokenizer = ByteTokenizer.build()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def chat_experiment(chat_tokenizer: Any, tmp_path: Path) -> Experiment:
    """The tiny experiment with a random-weight model in a folder, which writes and is measured in chats."""
    weights = random_llama(RandomWeights(), torch.float32)
    weights.model.resize_token_embeddings(len(chat_tokenizer))
    weights.model.save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    of_model = ["model.loader=transformers", f"model.name={tmp_path / 'chat'}", "model.dtype=float32", "model.device=cpu"]
    return load_experiment("tiny", of_model)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A chat server, and a cache of replies that no other test has seen."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """URI of a bucket at an S3 server on this machine, which the environment names as it would another provider's."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/tests", method="PUT")).close()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        yield "s3://tests"
    server.stop()


@pytest.fixture
def remote(bucket: str) -> Location:
    """A new folder in the bucket."""
    return locate(f"{bucket}/{uuid.uuid4().hex}")


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A new folder, once on this machine and once in the bucket."""
    if request.param == "local":
        return locate(tmp_path / "place")
    folder: Location = request.getfixturevalue("remote")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A Chromium without a window, for pages."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed; Debian: apt-get install chromium")
    with Browser(program) as browser:
        yield browser
