"""What is tried: goals, prompts, methods and every setting, for the tuning and for the report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saets.experiment.config import Experiment
from saets.experiment.loading import load_experiment

PAPER_GOALS = ("anger", "christian", "conspiracy", "french", "london", "love", "praise", "want_to_die", "wedding")

WITHOUT_FEATURES = {"smollm2": ("london",), "tiny": ("london",)}
"""Goals for which an SAE has no good feature, by preset: methods that steer towards given features leave them out."""

DEVELOPMENT_GOALS = ("cooking", "dogs", "medicine", "money", "music", "space")

PROMPTS = ("I think", "Surprisingly,")
TUNING_PROMPTS = ("The other day,",)

TRIED: dict[str, tuple[str, ...]] = {
    "sae_ts": ("sae_ts:bias_weight=1", "sae_ts:bias_weight=0.5", "sae_ts:bias_weight=0.25", "sae_ts:bias_weight=0"),
    "fgaa": tuple(f"fgaa:bias_weight={weight},fgaa_features={kept}" for weight in ("1", "0.25") for kept in (1, 2, 4, 8)),
    "ridge": tuple(f"ridge:bias_weight={weight},ridge_penalty={penalty}" for weight in ("1", "0.25") for penalty in (0.1, 1, 10)),
    "constrained": (
        *(f"constrained:bias_weight={weight}" for weight in ("1", "0.5", "0.25")),
        *(f"constrained:constrained_gamma={gamma}" for gamma in (0.03, 0.3)),
    ),
}
"""Every setting that the development goals choose from, by method. Of equal scores the first counts."""

TRIED_ALIKE = ("constrained:bias_weight=1", "constrained:bias_weight=0.5")
"""Settings of `constrained` tried once more with all features held still alike (`steering.stillness = "equal"`)."""

REPORTED = ("caa", "sae", "sae_ts:bias_weight=1", "sae_ts:bias_weight=0", "pinverse", "rotation")
"""Methods of the report that nothing is chosen for; those of `TRIED` come as chosen."""

NEED_NO_FEATURES = ("caa", "fgaa")


@dataclass(frozen=True)
class Part:
    """One run folder."""

    name: str
    goals: tuple[str, ...]
    methods: tuple[str, ...]
    prompts: tuple[str, ...]
    samples: int
    changes: tuple[str, ...] = ()
    """Other settings, as `section.key=value`."""

    def points(self, scales: Sequence[float]) -> int:
        """Completions of a prompt and sample: one a goal, method and scale above 0, and one unsteered a goal."""
        return len(self.goals) * (len(self.methods) * sum(scale > 0 for scale in scales) + (0 in scales))

    def texts(self, scales: Sequence[float]) -> int:
        """Completions in all."""
        return self.points(scales) * len(self.prompts) * self.samples


@dataclass(frozen=True)
class Chosen:
    """What the development goals chose."""

    tuning_scales: tuple[float, ...]
    """In units of the residual stream's median length, 0 among them; as are the others."""
    scales: tuple[float, ...]
    """Of the report."""
    methods: dict[str, str]
    """The variant of each method of `TRIED`."""
    stillness: str
    """Of `constrained`: `measured` or `equal`."""


@dataclass(frozen=True)
class Study:
    """The experiment at its full size, or as small as a test needs it."""

    preset: str = "smollm2"
    development: tuple[str, ...] = DEVELOPMENT_GOALS
    goals: tuple[str, ...] = PAPER_GOALS
    tuning_samples: int = 24
    """A scale of the tuning, which has one prompt."""
    samples: int = 32
    """A scale and prompt of the report; with two prompts, 64 a scale."""
    scale_count: int = 8
    """Scales above 0."""
    tried: tuple[tuple[str, tuple[str, ...]], ...] = tuple(TRIED.items())
    alike: tuple[str, ...] = TRIED_ALIKE
    changes: tuple[str, ...] = ()
    """Settings of all parts, as `section.key=value`."""

    def tuning(self) -> tuple[Part, Part]:
        """Every setting, and those of `constrained` that hold all features still alike."""
        tried = tuple(method for _, methods in self.tried for method in methods)
        first = Part("tune", self.development, tried, TUNING_PROMPTS, self.tuning_samples)
        alike = ("steering.stillness=equal",)
        return first, Part("tune-alike", self.development, self.alike, TUNING_PROMPTS, self.tuning_samples, alike)

    def calibrated(self, chosen: Mapping[str, str]) -> Part:
        """The development goals with all methods of the report, in the folder of the tuning: for their calibrated scales."""
        return dataclasses.replace(self.tuning()[0], methods=tuple(dict.fromkeys((*REPORTED, *chosen.values()))))

    def report(self, chosen: Chosen) -> tuple[Part, ...]:
        """The goals with features and all methods; those without, and the methods that need none."""
        missing = tuple(goal for goal in self.goals if goal in WITHOUT_FEATURES.get(self.preset, ()))
        methods = tuple(dict.fromkeys((*REPORTED, *chosen.methods.values())))
        few = tuple(method for method in methods if method.partition(":")[0] in NEED_NO_FEATURES)
        with_features = tuple(goal for goal in self.goals if goal not in missing)
        setting = (f"steering.stillness={chosen.stillness}",)
        parts = (
            Part("report", with_features, methods, PROMPTS, self.samples, setting),
            Part("report-contrast", missing, few, PROMPTS, self.samples),
        )
        return tuple(part for part in parts if part.goals)

    def experiment(self, part: Part, scales: Sequence[float]) -> Experiment:
        """The settings of a part; features that they give to goals of other parts are left out."""
        experiment = load_experiment(
            self.preset,
            [
                f"steering.goals={json.dumps(part.goals)}",
                f"steering.methods={json.dumps(part.methods)}",
                f"evaluation.prompts={json.dumps(part.prompts)}",
                f"evaluation.samples={part.samples}",
                "evaluation.scale_unit=residual",
                f"evaluation.scales={json.dumps(list(scales))}",
                *self.changes,
                *part.changes,
            ],
        )
        features = {goal: found for goal, found in experiment.steering.features.items() if goal in part.goals}
        return experiment.model_copy(update={"steering": experiment.steering.model_copy(update={"features": features})})


def scale_grid(low: float, high: float, length: float, count: int) -> tuple[float, ...]:
    """0, and scales from `low` to `high` in even steps of their logarithm.

    In units of `length`, the residual stream's, to two digits.
    """
    steps = np.geomspace(low, high, count) / length
    return (0.0, *dict.fromkeys(float(f"{step:.2g}") for step in steps))


FULL = Study()

QUICK = Study(
    preset="tiny",
    development=("cooking", "space"),
    goals=("anger", "london", "wedding"),
    tuning_samples=4,
    samples=4,
    scale_count=2,
    tried=tuple((family, methods[:: max(1, len(methods) - 1)]) for family, methods in TRIED.items()),
    alike=TRIED_ALIKE[:1],
    changes=(
        "effects.sources=[{kind='decoder', stop=24}]",
        "steering.max_density=1",
        "evaluation.new_tokens=8",
        *(f"steering.features.{goal}=[[{number}, 1.0]]" for number, goal in enumerate(("cooking", "space", "anger", "wedding"))),
    ),
)
"""Random weights, two settings a method: shows that everything works, and nothing else."""
