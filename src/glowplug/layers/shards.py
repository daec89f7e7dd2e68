"""Weights that are distributed over processes (DTensors), and the forwards that libraries wrap around their modules.

Nothing here imports `torch.distributed`, because not every build of torch has it: distributed tensors are recognised by
their attributes. Checked on torch 2.11 and 2.13.
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
    """This process's shard of a distributed tensor; any other tensor as it is."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def sharding_text(tensor: torch.Tensor) -> str:
    """How a tensor is distributed, as text that is equal in processes with equal shard sizes. Empty if it is not
    distributed."""
    if not is_sharded(tensor):
        return ""
    sharded: Any = tensor
    local = sharded._local_tensor
    return f" shard {tuple(local.shape)} {local.stride()} {sharded.placements!r} on {placing_text(sharded.device_mesh)}"


def placing_text(value: Any) -> str | None:
    """Describe a placement, or a device mesh without this process's position in it. None for any other value."""
    if type(value).__module__.startswith("torch.distributed.tensor"):
        return repr(value)
    if hasattr(value, "mesh_dim_names") and hasattr(value, "device_type") and hasattr(value, "get_group"):
        return f"mesh {value.device_type} {tuple(value.shape)} {value.mesh_dim_names}"
    return None


def wrapped_forward(module: nn.Module) -> types.FunctionType | None:
    """The forward that tensor or expert parallelism wrapped around a module's own; None if there is none."""
    forward = module.__dict__.get("forward")
    if not isinstance(forward, types.FunctionType) or forward.__name__ not in _WRAPPERS:
        return None
    known = "<locals>" in forward.__qualname__ and forward.__module__.startswith(_LIBRARIES)
    return forward if known and set(forward.__code__.co_freevars) >= {"module", "original_forward"} else None


def cells_of(function: types.FunctionType) -> dict[str, Any]:
    """The contents of a function's cells, by name."""
    names = function.__code__.co_freevars
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
