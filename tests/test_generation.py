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
from saets.experiment.config import Experiment, settings_hash
from saets.experiment.goal import contrast_tokens, load_goal
from saets.generation import SteeringWorker
from saets.records import UNSTEERED, GenerationItem, unit
from saets.run_folder.store import RunFolder
from saets.stages.evaluate import generation_items, grade_settings
from saets.stages.ingredients import made_from
from saets.stages.session import Session
from saets.stages.side_effects import measurement_identity
from saets.terminal.progress import Silent
from saets.tokens import completion_text, encode
from saets.vector.positions import Positions
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


PLACES = [{"positions": "prompt"}, {"positions": "generated"}, {"positions": "all", "bos": False}]


@pytest.mark.parametrize("places", PLACES)
def test_texts_are_steered_at_the_evaluations_positions(tiny_experiment: Experiment, places: dict[str, Any]) -> None:
    evaluation = tiny_experiment.evaluation.model_copy(update={"prompts": ("hi", "I think"), **places})
    worker = SteeringWorker(tiny_experiment.model_copy(update={"evaluation": evaluation}))
    direction, tokenizer = unit(np.arange(32.0) - 16), worker.model.tokenizer
    asked = items(("hi", "I think"), "v", 30.0)
    everywhere = SteeringWorker(tiny_experiment).generate(asked, {"v": direction})
    found = worker.generate(asked, {"v": direction})
    for item, text in zip(asked, found, strict=True):
        start = tuple(encode(tokenizer, item.prompt))
        added = 30 * torch.from_numpy(direction)[None]
        at = Positions(evaluation.positions, evaluation.bos)
        length = len(start) + evaluation.new_tokens
        tokens = worker.engine.run([Row(start, item.seed, 0)], added, length, share_prompts=False, positions=at).tokens[0]
        assert text.completion == completion_text(tokenizer, tokens[len(start) :].tolist())
    assert [text.completion for text in found] != [text.completion for text in everywhere]


def test_exchanges_need_a_chat_template(chat_goal: Any, tiny: Any) -> None:
    with pytest.raises(InputError, match="no chat template"):
        contrast_tokens(tiny.tokenizer, chat_goal, "positive")


def session_of(experiment: Experiment, folder: Path) -> Session:
    cluster = Cluster(experiment.execution)
    return Session(experiment, RunFolder(folder), cluster, SteeringPool(experiment, cluster), Silent())


def test_ids_of_runs_made_before_there_was_a_choice_of_positions_stay(tiny_experiment: Experiment, tmp_path: Path) -> None:
    session, london = session_of(tiny_experiment, tmp_path), load_goal("london")
    vectors = {("london", "caa"): SteeringVector(torch.eye(32)[0], "blocks.2.hook_resid_post")}
    ids = [item.generation_id for item in generation_items(session, vectors)]
    assert (ids[0], ids[-1], settings_hash(ids)) == ("ac5ccab97957e3c8", "cb2738e0fb72eb62", "f20a4db554c056d2")
    assert settings_hash(made_from(session, london, "caa")) == "cc7f1d6f3c37b8d9"
    assert settings_hash(made_from(session, london, "sae")) == "a0b04947396c25ca"
    assert grade_settings(session, london) == "5c139b3ee8eee84c"
    assert measurement_identity(session) == "9d6e49b72cdd73d9"


def test_other_positions_make_other_steered_texts_vectors_and_side_effects_and_keep_unsteered_ones(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    vectors, london = {("london", "caa"): SteeringVector(torch.eye(32)[0], "blocks.2.hook_resid_post")}, load_goal("london")
    kept, steered, made, measured = [], [], [], []
    for places in ({}, *PLACES, {"positions": "generated", "bos": False}):
        evaluation = tiny_experiment.evaluation.model_copy(update=places)
        session = session_of(tiny_experiment.model_copy(update={"evaluation": evaluation}), tmp_path)
        items = generation_items(session, vectors)
        kept.append([item.generation_id for item in items if item.scale == 0])
        steered.append({item.generation_id for item in items if item.scale > 0})
        made.append(settings_hash(made_from(session, london, "caa")))
        measured.append(measurement_identity(session))
    assert all(ids == kept[0] for ids in kept) and kept[0]
    assert len(set().union(*steered)) == 4 * len(steered[0])
    assert steered[2] == steered[4], "BOS is part of the prompt, so `generated` says nothing of it"
    assert len(set(made)) == len(set(measured)) == 4


def test_a_vector_left_at_its_own_length_is_tried_at_so_much_larger_scales(tiny_experiment: Experiment, tmp_path: Path) -> None:
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    unit, raw = (SteeringVector(direction, "blocks.2.hook_resid_post", facts) for facts in ({}, {"raw_length": 1.5}))
    session = session_of(tiny_experiment, tmp_path)
    items = generation_items(session, {("london", "pinverse"): unit, ("london", "pinverse_raw"): raw})
    scales = {method: {item.scale for item in items if item.method == method} for method in ("pinverse", "pinverse_raw")}
    assert scales == {"pinverse": {8.0, 16.0}, "pinverse_raw": {12.0, 24.0}}
    assert len({item.generation_id for item in items}) == len(items)
    seeds = {method: [item.seed for item in items if item.method == method] for method in scales}
    assert seeds["pinverse"] == seeds["pinverse_raw"], "noise is shared between methods"
