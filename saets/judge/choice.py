"""Which judge the settings name, and whether it can be used here."""

from __future__ import annotations

from collections.abc import Callable

from saets.experiment.config import JudgeSettings
from saets.files.storage import shareable
from saets.judge.embedder import locate_embedder
from saets.judge.openai import OpenAIJudge


def judge_identity(settings: JudgeSettings) -> str:
    """Tells this judge from others; may hold a path of this machine."""
    return f"{settings.kind}:{settings.embedder if settings.kind == 'local' else settings.model}"


def judge_name(settings: JudgeSettings) -> str:
    """The judge's name, as it stands in every grade and in tables: of a path the last part."""
    return f"{settings.kind}:{shareable(settings.embedder if settings.kind == 'local' else settings.model)}"


def check_judge(settings: JudgeSettings) -> None:
    """Raise `InputError` where the judge cannot be used: no key, no embedder. No call is made and no weights are read."""
    _CHECKS[settings.kind](settings)


_CHECKS: dict[str, Callable[[JudgeSettings], object]] = {
    "local": lambda settings: locate_embedder(settings.embedder),
    "openai": OpenAIJudge,
}
