"""Kinds of devices: memory, speeds, and where each figure comes from."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saets.errors import InputError, unknown

CPU = "cpu"

USABLE = 0.93
"""Share of a GPU's memory that a process can have; the rest goes to its context."""


class Machine(NamedTuple):
    """One device: a GPU, or a core of a CPU."""

    kind: str
    name: str
    memory: float | None
    """Bytes; None for a CPU, whose memory the cores share."""
    flops: Mapping[str, float]
    """Operations a second of large matrix products at their best, by precision."""
    bandwidth: float
    """Bytes a second between memory and processor."""
    efficiency: Mapping[str, Any]
    """Share of the bound that the engine reaches: by kind of work, or as pairs of d_model and share."""
    block_seconds: float
    """That a step takes through a block besides, however few rows there are."""
    measured: bool
    """Whether the engine was run on such a device."""
    origin: str

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.kind != CPU

    def share(self, work: str, d_model: int) -> float:
        """Share of the bound that work of this kind reaches: `decode`, `pass` or `bridge`."""
        if work in self.efficiency:
            return float(self.efficiency[work])
        (low, of_low), (high, of_high) = self.efficiency["by_width"]
        along = (math.log(d_model) - math.log(low)) / (math.log(high) - math.log(low))
        return float(of_low * (of_high / of_low) ** min(1.0, max(0.0, along)))

    def seconds(self, work: str, d_model: int, cost: Cost, dtype: str) -> float:
        """Time of some work: what its operations or its traffic take, whichever is more, at the share that is reached.

        Encoders compute in float32, whatever the model does.
        """
        computing = cost.flops / self.flops[dtype] + cost.flops32 / self.flops["float32"]
        return max(computing, cost.moved / self.bandwidth) / self.share(work, d_model) + cost.blocks * self.block_seconds


class Cost(NamedTuple):
    """What some work asks of a device."""

    flops: float
    """Operations in the model's precision."""
    flops32: float
    """Operations in float32."""
    moved: float
    """Bytes read or written: weights, keys and values, logits."""
    blocks: float
    """Blocks run one after another, by steps."""


def gpu_kinds() -> list[str]:
    """Names of the GPUs that are known."""
    return sorted(_table()["gpus"])


def machine(kind: str) -> Machine:
    """The device of this name.

    Raises:
        InputError: no such kind (lists them).
    """
    table = _table()
    if kind == CPU:
        return _cpu(table["cpu"])
    if kind not in table["gpus"]:
        raise unknown("GPU", kind, gpu_kinds())
    found, common = table["gpus"][kind], table["gpu"]
    flops = {"bfloat16": 1e12 * found["half"], "float16": 1e12 * found["half"], "float32": 1e12 * found["single"]}
    return Machine(
        kind,
        found["name"],
        1e9 * found["memory"],
        flops,
        1e9 * found["bandwidth"],
        {"by_width": common["efficiency"]},
        common["block_seconds"],
        kind == common["measured_on"],
        f"{found['origin']}; {common['origin']}",
    )


def gpu_here() -> str | None:
    """The kind of the GPU of this machine; None where torch sees none.

    Raises:
        InputError: one that is not in the table.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    for kind, found in _table()["gpus"].items():
        if all(word in name for word in found["called"]):
            return str(kind)
    raise InputError(f"this machine's GPU, {name}, is not in the table; name the nearest with --gpu: {', '.join(gpu_kinds())}")


def start_seconds(what: str) -> float:
    """How long something takes to start, by the table."""
    return float(_table()["start"][what])


def rate(what: str) -> float:
    """A rate of the table: operations a second of a fit, bytes a second from disk, seconds of a call."""
    return float(_table()["rates"][what])


def _cpu(found: Mapping[str, Any]) -> Machine:
    flops = {"bfloat16": 1e9 * found["bfloat16"], "float32": 1e9 * found["float32"], "float16": 1e9 * found["float16"]}
    return Machine(
        CPU,
        "CPU core",
        None,
        flops,
        1e9 * found["bandwidth"],
        found["efficiency"],
        found["block_seconds"],
        True,
        found["origin"],
    )


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "machines.toml").read_text())
