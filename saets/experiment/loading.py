"""Finding an experiment and reading it: a preset name, a TOML file or a run folder, with `section.key=value` overrides.

Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from saets.errors import InputError, unknown
from saets.experiment.config import DATASET, LOSS_RULES, PACKAGED, PRESETS, SOURCES, Experiment
from saets.experiment.model_config import Sae
from saets.files.storage import Location, Where, is_uri, locate


def preset_names() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_experiment(where: Where, overrides: Iterable[str] = ()) -> Experiment:
    """Read an experiment from a preset name, a TOML file or a run folder, and apply `section.key=value` overrides.

    File and folder may be given as URIs. Relative paths in a local TOML file are taken from the file's own folder.

    Raises:
        InputError: no such preset or file, damaged TOML, unknown or missing keys, values that cannot be.
    """
    path = _find(where)
    try:
        settings = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    if path.local is not None and not path.local.is_relative_to(PRESETS):
        _anchor(settings, path.local.parent)
    _merge(settings, _changes(overrides))
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise InputError(f"{path.name}: {_one_line(error)}") from error


def _find(where: Where) -> Location:
    path = locate(where)
    path.check()
    if path.is_folder():
        inside = path / "experiment.toml"
        if not inside.is_file():
            raise InputError(f"{path} is a folder without experiment.toml; give a run folder, a TOML file or a preset name")
        return inside
    if path.name.endswith(".toml"):
        if not path.is_file():
            raise InputError(f"no such experiment file: {path}")
        return path
    if path.local is None:
        raise InputError(f"no run folder at {path}; give one that a run has written, a TOML file or a preset name")
    preset = PRESETS / f"{where}.toml"
    if "/" in str(where) or not preset.is_file():
        raise unknown("preset", str(where), preset_names())
    return locate(preset)


def _anchor(settings: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute; a model name is a path only where such a folder exists."""

    def resolve(table: Any, key: str, *, only_if_exists: bool = False) -> None:
        if not isinstance(table, dict) or not isinstance(table.get(key), str):
            return
        if table[key].startswith((PACKAGED, DATASET)) or is_uri(table[key]):
            return
        path = (folder / table[key]).resolve()
        if path.exists() or not only_if_exists:
            table[key] = str(path)

    resolve(settings.get("model"), "name", only_if_exists=True)
    resolve(settings.get("sae"), "path")
    resolve(settings.get("judge"), "embedder", only_if_exists=True)
    resolve(settings.get("judge"), "cache")
    effects = settings.get("effects")
    if isinstance(effects, dict):
        resolve(effects, "calibration_text")
        resolve(effects, "shipped")
        for source in effects.get("sources") or ():
            resolve(source.get("sae") if isinstance(source, dict) else None, "path")
            resolve(source, "path")
            resolve(source, "approximator")
    steering = settings.get("steering")
    if isinstance(steering, dict) and isinstance(steering.get("goals"), list):
        steering["goals"] = [
            str((folder / goal).resolve()) if isinstance(goal, str) and goal.endswith(".toml") else goal
            for goal in steering["goals"]
        ]


def _changes(overrides: Iterable[str]) -> dict[str, Any]:
    """The overrides as nested settings; relative paths in them are taken from the working folder."""
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override!r}: expected section.key=value, e.g. effects.rollouts=8")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *sections, last = key.strip().split(".")
        table = changes
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {override!r}: {section} is a value, not a section")
        table[last] = value
    _anchor(changes, Path.cwd())
    return changes


def _merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changes over settings, table by table; a new loss rule takes the place of the old one."""
    if changes.keys() & set(LOSS_RULES):
        for rule in LOSS_RULES:
            settings.pop(rule, None)
    for key, value in changes.items():
        if isinstance(value, dict) and key in settings:
            if not isinstance(settings[key], dict):
                raise InputError(f"--set {key}.{next(iter(value))}: {key} is a value, not a section")
            _merge(settings[key], value)
        else:
            settings[key] = value


def _one_line(error: ValidationError) -> str:
    parts = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            *section, key = [str(part) for part in item["loc"]]
            parts.append(str(unknown(f"key in [{'.'.join(section) or 'experiment'}]", key, _fields(section))))
        elif item["type"] == "missing":
            parts.append(f"missing key {where}; add it")
        elif item["type"] == "value_error":
            parts.append(item["msg"].removeprefix("Value error, "))
        else:
            parts.append(f"{where}: {item['msg'][0].lower()}{item['msg'][1:]}; got {item['input']!r}")
    return "; ".join(parts)


def _fields(section: list[str]) -> list[str]:
    """Names of the keys a section knows; list positions and union tags in the path are skipped."""
    model: type[BaseModel] = Experiment
    for name in section:
        field = model.model_fields.get(name)
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        elif name == "sae":
            model = Sae
        elif name in SOURCES:
            model = SOURCES[name]
    return list(model.model_fields)


def effect_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that decide what an effect is; rows measured with other ones never share a folder or a fit."""
    dump = experiment.model_dump(mode="json", exclude_none=True)
    settings = {key: value for key, value in dump["effects"].items() if key not in ("sources", "shipped")}
    for key, before in (
        ("dtype", "float16"),
        ("prompt_format", "plain"),
    ):  # what rows have that were measured before there was a choice
        if settings[key] == before:
            del settings[key]
    return {
        "model": model_settings(experiment),
        "sae": dump["sae"],
        "hook_name": experiment.hook_name,
        "seed": experiment.seed,
        "effects": settings,
    }


def sampling_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings of the evaluation that decide what a completion may say, besides its prompt's vector, scale and seed."""
    settings = experiment.evaluation.model_dump(include={"prompts", "prompt_format", "new_tokens", "top_k", "temperature"})
    if settings["prompt_format"] == "plain":  # as all texts were written before there was a choice
        del settings["prompt_format"]
    return settings


def model_settings(experiment: Experiment) -> dict[str, Any]:
    """The settings that say which model it is; where it runs does not matter."""
    return experiment.model.model_dump(mode="json", exclude_none=True, exclude={"device", "device_map"})
