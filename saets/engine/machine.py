"""What the machine has: rows that fit into memory, models that share a GPU, signs that memory ran out, bfloat16 arithmetic."""

from __future__ import annotations

from pathlib import Path

import torch

from saets.engine.decoder import Decoder

MOST_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows beyond which a step does not run faster per row, by kind of device."""

SHARE = 0.7
"""Share of the free memory that rows may take; the rest is for what is not counted here."""

MOST_ON_A_GPU = 4
"""More processes only wait for each other."""

FILLED = 0.85
"""Share of a memory that is planned with where processes share it."""

PROCESS_BYTES = 2 * 2**30
"""What a process takes beside its model: libraries, a CUDA context."""

SIGNS = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")
"""What torch says when a CPU has no memory left; there is no error type for it."""


def most_rows(device_type: str) -> int:
    """Rows a step where memory does not matter."""
    return MOST_ROWS.get(device_type, MOST_ROWS["cpu"])


def rows_that_fit(decoder: Decoder, length: int, d_sae: int, *, share: float = 1.0) -> int:
    """Rows a step that the free memory of the model's device holds, at least one; `share` is this process's part of it.

    Of several devices the fullest decides, as though it had to hold all of a row.
    """
    free = min(free_bytes(device) for device in decoder.devices) * share
    return rows_in(free, row_bytes(decoder.bytes_per_row(length), d_sae), decoder.device.type)


def row_bytes(decoding: int, d_sae: int) -> int:
    """Memory that a row takes: what `Decoder.bytes_per_row` says, and its feature activations."""
    return decoding + 3 * 4 * d_sae


def rows_in(free: float, row: int, device_type: str) -> int:
    """Rows a step in so much free memory, at least one."""
    return max(1, min(int(free * SHARE // row), most_rows(device_type)))


def processes_on_gpu(memory: float, each: int) -> int:
    """How many processes of so many bytes `auto` lets share a GPU, at least one."""
    return max(1, min(MOST_ON_A_GPU, int(FILLED * memory / each)))


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; one that does not takes many times as long as in float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
