"""SAE-Targeted Steering: measure what steering vectors do to SAE features, and build vectors that hit chosen ones."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saets.engine.rollout import RolloutEngine
    from saets.errors import InputError
    from saets.experiment.config import Experiment
    from saets.experiment.goal import Goal, load_goal
    from saets.experiment.loading import load_experiment
    from saets.explore import Run
    from saets.fit.approximator import EffectApproximator
    from saets.model import load_model
    from saets.sae import load_sae
    from saets.vector.vector import ScaledVector, SteeringVector

__all__ = [
    "EffectApproximator",
    "Experiment",
    "Goal",
    "InputError",
    "RolloutEngine",
    "Run",
    "ScaledVector",
    "SteeringVector",
    "load_experiment",
    "load_goal",
    "load_model",
    "load_sae",
]

_HOMES = {
    "EffectApproximator": "fit.approximator",
    "Experiment": "experiment.config",
    "Goal": "experiment.goal",
    "InputError": "errors",
    "RolloutEngine": "engine.rollout",
    "Run": "explore",
    "ScaledVector": "vector.vector",
    "SteeringVector": "vector.vector",
    "load_experiment": "experiment.loading",
    "load_goal": "experiment.goal",
    "load_model": "model",
    "load_sae": "sae",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `saets --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'saets' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saets.{_HOMES[name]}"), name)
