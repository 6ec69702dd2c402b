"""A goal of steering: what a text should be about, contrast pairs, examples for the local judge, and features.

One TOML file a goal, shared by all methods. The package carries the paper's nine, and six others on which settings may
be chosen; a path adds one's own.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from saets.errors import InputError, unknown
from saets.experiment.config import PRESETS, Experiment
from saets.experiment.model_config import Section
from saets.tokens import check_chat, encode

COHERENCE = "The text is coherent and its grammar is correct."
"""The second criterion, the same for every goal."""

Features = tuple[tuple[int, float], ...]
"""Pairs of (SAE feature id, weight)."""

MIN_PAIRS = 10
MIN_EXAMPLES = 8


class Exchange(Section):
    """A contrast text in chat form: what a user says, and the assistant's answer, which is what is contrasted."""

    user: str
    assistant: str = Field(min_length=1)


ContrastItem = Annotated[
    Annotated[str, Tag("text")] | Annotated[Exchange, Tag("exchange")],
    Discriminator(lambda item: "exchange" if isinstance(item, dict | Exchange) else "text"),
]

Side = Literal["positive", "negative"]
SIDES: tuple[Side, ...] = ("positive", "negative")


class Contrast(Section):
    """Texts with and without the behaviour, paired by position; all of them plain, or all `{user = "...", assistant = "..."}`."""

    positive: tuple[ContrastItem, ...] = Field(min_length=MIN_PAIRS)
    negative: tuple[ContrastItem, ...] = Field(min_length=MIN_PAIRS)

    @property
    def chat(self) -> bool:
        """Whether the texts are in chat form."""
        return isinstance(self.positive[0], Exchange)

    @model_validator(mode="after")
    def _paired(self) -> Contrast:
        if len({type(item) for item in (*self.positive, *self.negative)}) > 1:
            raise ValueError("contrast mixes plain texts and {user, assistant} tables; give all of them in one form")
        if len(self.positive) != len(self.negative):
            raise ValueError(f"contrast has {len(self.positive)} positive and {len(self.negative)} negative texts; pair them")
        if set(self.positive) == set(self.negative):
            raise ValueError("contrast.positive and contrast.negative are the same texts; nothing would be left to steer")
        return self


class Examples(Section):
    """Texts that calibrate the local judge; never used to build a vector."""

    positive: tuple[str, ...] = Field(min_length=MIN_EXAMPLES)
    negative: tuple[str, ...] = Field(min_length=MIN_EXAMPLES)


class GoalFeatures(Section):
    """A goal's features in one SAE."""

    target: Features = Field(min_length=1)
    """Features that should rise."""
    sae: Features | None = None
    """Features whose decoder rows the `sae` method adds, where they differ from the target."""


class Goal(Section):
    """One goal file."""

    id: str
    name: str
    behaviour: str
    """The criterion a judge grades."""
    contrast: Contrast
    examples: Examples
    features: dict[str, GoalFeatures] = {}
    """By experiment name."""

    @model_validator(mode="after")
    def _disjoint(self) -> Goal:
        contrast = {
            item.assistant if isinstance(item, Exchange) else item for item in (*self.contrast.positive, *self.contrast.negative)
        }
        shared = contrast & {*self.examples.positive, *self.examples.negative}
        if shared:
            raise ValueError(
                f"{len(shared)} texts are in both contrast and examples, e.g. {sorted(shared)[0]!r}; keep them apart"
            )
        return self


def goal_names() -> list[str]:
    """Ids of the goals that come with the package."""
    return sorted(path.stem for path in (PRESETS / "goals").glob("*.toml"))


def load_goal(name: str) -> Goal:
    """The goal with this id, or the one in this TOML file.

    Raises:
        InputError: unknown goal, damaged file, too few or identical pairs, examples that are also contrast texts.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / "goals" / f"{name}.toml"
    if not path.is_file():
        if name.endswith(".toml"):
            raise InputError(f"no such goal file: {name}")
        raise unknown("goal", name, goal_names())
    try:
        return Goal.model_validate({"id": path.stem, **tomllib.loads(path.read_text(encoding="utf-8"))})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"goal file {path.name} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"goal file {path.name}: {where + ': ' if where else ''}{message}") from error


class ContrastTokens(NamedTuple):
    """A contrast text as tokens."""

    tokens: list[int]
    start: int
    """The first position that counts: 0, BOS, in a plain text; that of the answer in an exchange."""


def contrast_tokens(tokenizer: Any, goal: Goal, side: Side) -> list[ContrastTokens]:
    """The contrast texts of one side.

    A plain text is BOS and the text. An exchange is the user's turn by the chat template (see `tokens.encode`) and then the
    answer's tokens, as if the model had written them; the template and the user's turn are read but do not count.

    Raises:
        InputError: exchanges, and a tokenizer without a chat template.
    """
    found = []
    for item in getattr(goal.contrast, side):
        if isinstance(item, Exchange):
            before = encode(tokenizer, item.user, "chat")
            found.append(ContrastTokens(before + tokenizer.encode(item.assistant, add_special_tokens=False), len(before)))
        else:
            found.append(ContrastTokens(encode(tokenizer, item), 0))
    return found


def check_contrast(tokenizer: Any, goal: Goal) -> None:
    """Raise `InputError` where the contrast texts are in chat form and the tokenizer has no chat template."""
    if goal.contrast.chat:
        check_chat(tokenizer, f"goal {goal.id!r} has contrast pairs in chat form")


def goal_features(goal: Goal, experiment: Experiment) -> GoalFeatures:
    """The goal's features for this experiment: its own `steering.features` first, then the goal file's table.

    Raises:
        InputError: neither names any, or the weights are all zero.
    """
    own = experiment.steering.features.get(goal.id)
    table = experiment.steering.features_of or experiment.name
    if own is not None and not own:
        raise InputError(f"steering.features.{goal.id} is empty; give [[feature id, weight], ...], or leave it out")
    features = GoalFeatures(target=own) if own else goal.features.get(table)
    if features is None:
        raise InputError(
            f"goal {goal.id!r} has no features for {table!r}; known: {', '.join(goal.features) or 'none'}. "
            f"Set steering.features.{goal.id} = [[feature id, weight], ...] (`saets features` finds some), or choose methods "
            "that need none (caa, fgaa)"
        )
    for weights in (features.target, features.sae or features.target):
        totals: dict[int, float] = {}
        for feature, weight in weights:
            totals[feature] = totals.get(feature, 0.0) + weight
        if not any(totals.values()):
            raise InputError(f"goal {goal.id!r}: all feature weights are zero, or cancel")
    return features
