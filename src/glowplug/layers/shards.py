"""Weights that are distributed over processes (DTensors), and the forwards that libraries put around their modules.

Nothing here imports `torch.distributed`, which not every torch has: a distributed tensor is told by its parts. Checked
on torch 2.11 and 2.13.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

_WRAPPERS = ("tp_forward", "ep_forward")
_LIBRARIES = ("transformers.",)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is distributed over processes."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds: all of it, unless it is distributed."""
    found: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return found


def sharding_text(tensor: torch.Tensor) -> str:
    """How a tensor is distributed, as text that is equal in every process with shards of one size; empty when it is
    not."""
    if not is_sharded(tensor):
        return ""
    held: Any = tensor
    local = held._local_tensor
    return f" shard {tuple(local.shape)} {local.stride()} {held.placements!r} on {placing_text(held.device_mesh)}"


def placing_text(value: Any) -> str | None:
    """A mesh of devices by its form alone (whose place in it a process has, is left out), or how one dim of a mesh
    holds a tensor; None for any other value."""
    if type(value).__module__.startswith("torch.distributed.tensor"):
        return repr(value)
    if hasattr(value, "mesh_dim_names") and hasattr(value, "device_type") and hasattr(value, "get_group"):
        return f"mesh {value.device_type} {tuple(value.shape)} {value.mesh_dim_names}"
    return None


def wrapped_forward(module: nn.Module) -> types.FunctionType | None:
    """The forward that tensor parallelism put around a module's own, a function with cells; None when it put none."""
    found = module.__dict__.get("forward")
    if not isinstance(found, types.FunctionType) or found.__name__ not in _WRAPPERS:
        return None
    known = "<locals>" in found.__qualname__ and found.__module__.startswith(_LIBRARIES)
    return found if known and set(found.__code__.co_freevars) >= {"module", "original_forward"} else None


def cells_of(function: types.FunctionType) -> dict[str, Any]:
    """What a function's cells hold, by name."""
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
