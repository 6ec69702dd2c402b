"""The packaged goals against the paper's facts, and what a goal file may not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from saets.errors import InputError
from saets.experiment.goal import goal_features, goal_names, load_goal
from saets.experiment.loading import load_experiment

GOALS = ["anger", "christian", "conspiracy", "french", "london", "love", "praise", "want_to_die", "wedding"]

TARGETS = {
    "gemma-2-2b": {
        "anger": ((4111, 1.0),),
        "christian": ((5483, 1.0),),
        "conspiracy": ((8710, 1.0),),
        "french": ((8392, 0.5), (15769, 0.5)),
        "london": ((14455, 1.0),),
        "love": ((16036, 0.5), (7863, 0.5)),
        "praise": ((2054, 1.0),),
        "want_to_die": ((16226, 0.5), (9679, 0.5)),
        "wedding": ((4230, 1.0),),
    },
    "gemma-2-9b": {
        "anger": ((441, 1.0),),
        "christian": ((6387, 1.0),),
        "conspiracy": ((3358, 1.0),),
        "french": ((11691, 1.0),),
        "london": ((6915, 0.3), (9983, 0.4), (11748, 0.3)),
        "love": ((12983, 1.0),),
        "praise": ((9946, 1.0),),
        "want_to_die": ((11670, 1.0),),
        "wedding": ((2822, 1.0),),
    },
}
"""The features that SAE-TS steers towards in the paper."""

DECODED = {model: {**targets} for model, targets in TARGETS.items()}
"""The features whose decoder rows SAE steering adds: the same, but for praise on 2B."""
DECODED["gemma-2-2b"]["praise"] = ((11919, 1.0),)


def goal_file(folder: Path, **changes: Any) -> str:
    """A goal file of ten pairs and eight examples; `changes` replace its top-level keys."""
    goal = {
        "name": "Cats",
        "behaviour": "The text is about cats.",
        "contrast": {"positive": [f"cat {i}" for i in range(10)], "negative": [f"dog {i}" for i in range(10)]},
        "examples": {"positive": [f"kitten {i}" for i in range(8)], "negative": [f"puppy {i}" for i in range(8)]},
    }
    path = folder / "cats.toml"
    path.write_text(tomli_w.dumps({**goal, **changes}))
    return str(path)


def refusal(name: str) -> str:
    with pytest.raises(InputError) as refused:
        load_goal(name)
    return str(refused.value)


DEVELOPMENT = ["cooking", "dogs", "medicine", "money", "music", "space"]
"""Goals of this package, on which settings are chosen."""


def test_the_package_carries_the_nine_goals_of_the_paper_and_others_to_choose_settings_on() -> None:
    assert goal_names() == sorted(GOALS + DEVELOPMENT)


@pytest.mark.parametrize("name", [*GOALS, *DEVELOPMENT])
def test_a_packaged_goal_has_ten_distinct_pairs_and_eight_examples_and_keeps_the_two_apart(name: str) -> None:
    goal = load_goal(name)
    contrast, examples = goal.contrast, goal.examples
    assert goal.id == name
    assert len(contrast.positive) == len(contrast.negative) >= 10
    assert min(len(examples.positive), len(examples.negative)) >= 8
    texts = [*contrast.positive, *contrast.negative, *examples.positive, *examples.negative]
    assert len(set(texts)) == len(texts)
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("model", TARGETS)
@pytest.mark.parametrize("name", GOALS)
def test_the_gemma_features_are_those_of_the_paper(name: str, model: str) -> None:
    found = goal_features(load_goal(name), load_experiment(model))
    assert found.target == TARGETS[model][name]
    assert (found.sae or found.target) == DECODED[model][name]


def test_praise_on_2b_steers_towards_one_feature_and_decodes_another() -> None:
    found = load_goal("praise").features["gemma-2-2b"]
    assert found.target == ((2054, 1.0),)
    assert found.sae == ((11919, 1.0),)


def test_the_features_of_the_experiment_stand_over_those_of_the_goal_file() -> None:
    experiment = load_experiment("gemma-2-2b", ["steering.features.praise=[[7, 0.25], [9, -1.0]]"])
    found = goal_features(load_goal("praise"), experiment)
    assert found.target == ((7, 0.25), (9, -1.0))
    assert found.sae is None
    assert goal_features(load_goal("anger"), experiment).target == ((4111, 1.0),)


def test_an_experiment_can_read_the_features_table_of_another_name() -> None:
    experiment = load_experiment("gemma-2-2b", ["name=my-run", "steering.features_of=gemma-2-9b"])
    assert goal_features(load_goal("love"), experiment).target == ((12983, 1.0),)


def test_a_goal_without_features_for_the_experiment_is_refused_with_the_tables_it_has_and_the_ways_out() -> None:
    words = r"'anger' has no features for 'tiny'; known: .*gemma-2-2b.*steering\.features\.anger = .*that need none"
    with pytest.raises(InputError, match=words):
        goal_features(load_goal("anger"), load_experiment("tiny"))


@pytest.mark.parametrize("weights", ["[[3, 0.0]]", "[[3, 0.0], [4, 0]]", "[[3, 1.0], [3, -1.0]]"])
def test_weights_that_are_all_zero_are_refused(weights: str) -> None:
    with pytest.raises(InputError, match="'anger': all feature weights are zero"):
        goal_features(load_goal("anger"), load_experiment("tiny", [f"steering.features.anger={weights}"]))


def test_an_empty_list_of_features_is_refused() -> None:
    with pytest.raises(InputError, match="steering.features.anger is empty"):
        goal_features(load_goal("anger"), load_experiment("tiny", ["steering.features.anger=[]"]))


def test_zero_weights_of_the_sae_method_alone_are_refused_too(tmp_path: Path) -> None:
    goal = load_goal(goal_file(tmp_path, features={"tiny": {"target": [[3, 1.0]], "sae": [[4, 0.0]]}}))
    with pytest.raises(InputError, match="all feature weights are zero"):
        goal_features(goal, load_experiment("tiny"))


def test_a_goal_file_of_ones_own_loads_by_path_and_is_called_after_its_file(tmp_path: Path) -> None:
    goal = load_goal(goal_file(tmp_path, features={"tiny": {"target": [[3, 1.0], [4, 0.5]]}}))
    assert (goal.id, goal.name) == ("cats", "Cats")
    assert goal_features(goal, load_experiment("tiny")).target == ((3, 1.0), (4, 0.5))


@pytest.mark.parametrize(
    ("section", "side", "count"),
    [("contrast", "positive", 9), ("contrast", "negative", 0), ("examples", "positive", 7), ("examples", "negative", 7)],
)
def test_too_few_texts_are_refused_by_name_of_the_list(section: str, side: str, count: int, tmp_path: Path) -> None:
    enough = {"positive": [f"{section} cat {i}" for i in range(10)], "negative": [f"{section} dog {i}" for i in range(10)]}
    message = refusal(goal_file(tmp_path, **{section: {**enough, side: enough[side][:count]}}))
    assert f"{section}.{side}" in message
    assert "at least" in message


def test_lists_of_unequal_length_are_refused_with_both_lengths(tmp_path: Path) -> None:
    uneven = {"positive": [f"cat {i}" for i in range(12)], "negative": [f"dog {i}" for i in range(11)]}
    message = refusal(goal_file(tmp_path, contrast=uneven))
    assert "12 positive and 11 negative" in message


def test_identical_sets_are_refused_also_in_another_order(tmp_path: Path) -> None:
    same = [f"cat {i}" for i in range(10)]
    assert "the same texts" in refusal(goal_file(tmp_path, contrast={"positive": same, "negative": same[::-1]}))


@pytest.mark.parametrize("contrast_side", ["positive", "negative"])
@pytest.mark.parametrize("examples_side", ["positive", "negative"])
def test_an_example_that_is_also_a_contrast_text_is_refused_and_quoted(
    contrast_side: str, examples_side: str, tmp_path: Path
) -> None:
    contrast = {"positive": [f"cat {i}" for i in range(10)], "negative": [f"dog {i}" for i in range(10)]}
    examples = {"positive": [f"kitten {i}" for i in range(8)], "negative": [f"puppy {i}" for i in range(8)]}
    contrast[contrast_side][4] = examples[examples_side][2] = "the shared text"
    message = refusal(goal_file(tmp_path, contrast=contrast, examples=examples))
    assert "1 texts are in both contrast and examples" in message
    assert "'the shared text'" in message


def exchanges(what: str) -> list[Any]:
    return [{"user": "What is that?", "assistant": f"{what} {i}"} for i in range(10)]


def test_contrast_pairs_may_be_exchanges_of_a_user_and_an_assistant(tmp_path: Path) -> None:
    goal = load_goal(goal_file(tmp_path, contrast={"positive": exchanges("A cat"), "negative": exchanges("A dog")}))
    assert goal.contrast.chat
    assert not load_goal("london").contrast.chat
    assert goal.contrast.model_dump()["negative"][2] == {"user": "What is that?", "assistant": "A dog 2"}


@pytest.mark.parametrize(
    ("positive", "expected"),
    [
        ([*exchanges("A cat")[:9], "a cat"], "mixes plain texts and {user, assistant} tables"),
        ([f"A cat {i}" for i in range(10)], "mixes plain texts and {user, assistant} tables"),
        ([*exchanges("A cat")[:9], {"user": "What is that?"}], "contrast.positive.9.exchange.assistant"),
        ([*exchanges("A cat")[:9], {"user": "What is that?", "assistant": ""}], "contrast.positive.9.exchange.assistant"),
        (
            [*exchanges("A cat")[:9], {"user": "?", "assistant": "A cat", "system": "Purr."}],
            "contrast.positive.9.exchange.system",
        ),
        (exchanges("A dog"), "the same texts"),
        (exchanges("kitten"), "8 texts are in both contrast and examples"),
    ],
)
def test_exchanges_that_cannot_be_contrasted_are_refused(positive: list[Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(goal_file(tmp_path, contrast={"positive": positive, "negative": exchanges("A dog")}))


def test_an_unknown_goal_is_refused_with_the_nearest_one() -> None:
    message = refusal("lodnon")
    assert message.startswith("unknown goal 'lodnon'; known: anger, christian")
    assert message.endswith("did you mean 'london'?")


@pytest.mark.parametrize("content", [b"name = ", b'name = "\xff"'])
def test_a_goal_file_that_is_not_toml_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.toml"
    path.write_bytes(content)
    assert "damaged.toml is not valid TOML" in refusal(str(path))


def test_a_missing_goal_file_and_an_unknown_key_are_refused(tmp_path: Path) -> None:
    assert "no such goal file" in refusal(str(tmp_path / "none.toml"))
    assert "behavior" in refusal(goal_file(tmp_path, behavior="The text is about cats."))
