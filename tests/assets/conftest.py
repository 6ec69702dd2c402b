"""A random-weight model in a folder, as a machine without the package of the weights has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saets.experiment.model_config import RandomWeights
from saets.model import random_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    weights = random_llama(RandomWeights(), torch.float32)
    weights.model.save_pretrained(folder)
    weights.tokenizer.save_pretrained(folder)
    return folder
