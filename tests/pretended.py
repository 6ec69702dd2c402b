"""Several devices on a machine that has none: tensors that say they lie on `cpu:1` or `cpu:2`, and hold real numbers.

Work that mixes two devices fails as it would between two GPUs, and `to` moves. Numbers are computed on the CPU, so they can be
compared bit for bit with those of an ordinary tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

CPU = torch.device("cpu")


class Placed(Tensor):
    """A tensor on a pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )

    def __init__(self, held: Tensor, device: torch.device) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"{self.held!r} on {self.device}"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and (kwargs or {}).get("device") is not None:
            return torch.tensor(*args, **{**kwargs, "device": CPU}).to(kwargs["device"])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def pretended_devices() -> Iterator[None]:
    """While it lasts, tensors can be made on and moved to `cpu:1`, `cpu:2` and so on."""
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)  # a module's `to` makes new parameters
    try:
        with _Operations(), _Constructors(), torch.no_grad():
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(before)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
    asked = kwargs.get("device")
    places = {one.device for one in given if one.dim() or isinstance(one, Placed)}
    if name == "aten::copy_":
        places = {args[0].device}
    if name in ("aten::index.Tensor", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
        places = {args[0].device, *(place for place in places if place != CPU)}  # indices on the CPU are welcome everywhere
    if len(places) > 1 and name != "aten::_to_copy":
        raise RuntimeError(f"{name}: expected all tensors to be on one device, found {sorted(map(str, places))}")
    device = torch.device(asked) if asked is not None else next(iter(places), CPU)
    if asked is not None:
        kwargs = kwargs | {"device": CPU}
    bare_args, bare_kwargs = tree_map(lambda one: one.held if isinstance(one, Placed) else one, (args, kwargs))
    out = func(*bare_args, **bare_kwargs)
    if func._schema.is_mutable and name.endswith("_"):
        return args[0]
    if device == CPU:
        return out
    return tree_map(lambda one: Placed(one, device) if isinstance(one, Tensor) else one, out)
