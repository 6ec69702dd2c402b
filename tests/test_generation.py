"""A worker that writes text and reads contrast texts, plain and in chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saets.distributed.cluster import Cluster
from saets.distributed.pool import SteeringPool
from saets.engine.batch import Row
from saets.engine.sampling import row_seed
from saets.errors import InputError
from saets.experiment.config import Experiment
from saets.experiment.goal import contrast_tokens, load_goal
from saets.generation import SteeringWorker
from saets.records import UNSTEERED, GenerationItem, unit
from saets.run_folder.store import RunFolder
from saets.stages.evaluate import generation_items
from saets.stages.session import Session
from saets.terminal.progress import Silent
from saets.tokens import encode
from saets.vector.vector import SteeringVector
from tests.experiment.test_goal import goal_file


def exchanges(what: str) -> list[dict[str, str]]:
    return [{"user": f"question {i}", "assistant": f"{what} {i}"} for i in range(10)]


@pytest.fixture
def chat_goal(tmp_path: Path) -> Any:
    return load_goal(goal_file(tmp_path, contrast={"positive": exchanges("cat"), "negative": exchanges("dog")}))


def residual(worker: SteeringWorker, tokens: list[int]) -> torch.Tensor:
    """h_L [pos, d_model] of one text."""
    hook = worker.experiment.hook_name
    _, cache = worker.model.run_with_cache(torch.tensor([tokens]), names_filter=hook)
    return cache[hook][0]


def test_a_plain_contrast_text_is_averaged_over_all_tokens_bos_included(tiny_experiment: Experiment, tmp_path: Path) -> None:
    worker, goal = SteeringWorker(tiny_experiment), load_goal(goal_file(tmp_path))
    found = worker.contrast(goal)
    assert found["positive"].shape == found["negative"].shape == (10, 32)
    expected = residual(worker, encode(worker.model.tokenizer, "dog 3")).mean(0)
    assert np.allclose(found["negative"][3], expected, atol=1e-5)


def test_an_exchange_is_averaged_over_the_answer_which_follows_the_templates_prompt(
    chat_experiment: Experiment, chat_goal: Any
) -> None:
    worker = SteeringWorker(chat_experiment)
    tokenizer = worker.model.tokenizer
    prompt, answer = encode(tokenizer, "question 3", "chat"), tokenizer.encode("dog 3", add_special_tokens=False)
    assert contrast_tokens(tokenizer, chat_goal, "negative")[3] == ([*prompt, *answer], len(prompt))
    expected = residual(worker, [*prompt, *answer])[-len(answer) :].mean(0)
    assert np.allclose(worker.contrast(chat_goal)["negative"][3], expected, atol=1e-5)


def items(prompts: Sequence[str], vector_id: str = UNSTEERED, scale: float = 0.0) -> list[GenerationItem]:
    return [
        GenerationItem(f"{prompt}{i}", "g", "m", vector_id, scale, prompt, i, row_seed(0, prompt, i))
        for prompt in prompts
        for i in range(3)
    ]


def test_in_chat_a_completion_is_the_answer_to_the_users_turn_up_to_its_end(chat_experiment: Experiment) -> None:
    in_chat = {"prompt_format": "chat", "prompts": ("hi", "I think"), "new_tokens": 40}
    experiment = chat_experiment.model_copy(update={"evaluation": chat_experiment.evaluation.model_copy(update=in_chat)})
    worker = SteeringWorker(experiment)
    direction = unit(np.arange(32.0) - 16)
    asked = items(("hi", "I think"), "v", 8.0)
    found = worker.generate(asked, {"v": direction})
    tokenizer = worker.model.tokenizer
    ended = 0
    for item, text in zip(asked, found, strict=True):
        start = encode(tokenizer, item.prompt, "chat")
        rows = [Row(tuple(start), item.seed, 0)]
        tokens = worker.engine.run(rows, 8 * torch.from_numpy(direction)[None], len(start) + 40).tokens[0].tolist()
        answer = tokens[len(start) :]
        ends = [i for i, token in enumerate(answer) if token in (257, 258)]
        assert text.completion == tokenizer.decode(answer[: ends[0]] if ends else answer)
        assert text.prompt == item.prompt
        ended += bool(ends)
    assert ended


def test_exchanges_need_a_chat_template(chat_goal: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="no chat template"):
        contrast_tokens(tiny.tokenizer, chat_goal, "positive")


def test_a_vector_left_at_its_own_length_is_tried_at_so_much_larger_scales(tiny_experiment: Experiment, tmp_path: Path) -> None:
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    unit, raw = (SteeringVector(direction, "blocks.2.hook_resid_post", facts) for facts in ({}, {"raw_length": 1.5}))
    cluster = Cluster(tiny_experiment.execution)
    session = Session(tiny_experiment, RunFolder(tmp_path), cluster, SteeringPool(tiny_experiment, cluster), Silent())
    items = generation_items(session, {("london", "pinverse"): unit, ("london", "pinverse_raw"): raw})
    scales = {method: {item.scale for item in items if item.method == method} for method in ("pinverse", "pinverse_raw")}
    assert scales == {"pinverse": {8.0, 16.0}, "pinverse_raw": {12.0, 24.0}}
    assert len({item.generation_id for item in items}) == len(items)
    seeds = {method: [item.seed for item in items if item.method == method] for method in scales}
    assert seeds["pinverse"] == seeds["pinverse_raw"], "noise is shared between methods"
