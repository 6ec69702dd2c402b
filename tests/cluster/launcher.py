"""The one place that knows Ray's own check of a cluster file; it is private and may move."""

from __future__ import annotations

from typing import Any

from ray.autoscaler._private.util import prepare_config, validate_config


def check_launcher_file(config: dict[str, Any]) -> dict[str, Any]:
    """The file as `ray up` fills it out; raises what `ray up` would say of it. Nothing is asked of a cloud."""
    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared
