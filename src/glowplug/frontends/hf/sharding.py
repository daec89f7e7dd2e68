"""Transformers' tensor parallelism: finds the distributed modules of a model, replaces them in a trace, and lets the
processes agree. Checked on transformers 5.23.

The weights of a distributed module are DTensors, and its `forward` is a closure that runs this process's part and the
collectives; all tensors between such modules are plain. A trace sees a call of `glowplug::sharded` in each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.errors import CaptureError, NotServableError
from glowplug.layers.shards import cells_of, is_sharded, local_of, wrapped_forward
from glowplug.ops.layer_op import layer_op

_SAME_SHAPE = ("MoeExpertsParallel", "AllReduceParallel", "MoeIdentityParallel")
_COLUMNS = ("ColwiseParallel", "PackedColwiseParallel")
_PLAIN = ("ReplicatedWithGradAllReduce", "MlaKvAProjParallel")
"""Styles that change only gradients."""


class Processes:
    """The processes of a group, which run one model together. All of them must call each method together."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.count = torch.distributed.get_world_size(group)

    def gather(self, mine: Any) -> list[Any]:
        """Each process's value, in the order of ranks."""
        values = [None] * self.count
        torch.distributed.all_gather_object(values, mine, group=self.group)
        return values

    def agree(self, reason: str | None) -> str | None:
        """The reason of the first process that has one, in all processes; None if none has."""
        reasons = enumerate(self.gather(reason))
        return next((f"process {rank}: {text}" for rank, text in reasons if text is not None), None)


def processes_of(model: nn.Module) -> Processes | None:
    """The processes of the model's tensor parallelism; None if it is not distributed.

    Raises:
        CaptureError: the model is distributed in other ways, too.
    """
    meshes = [parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)]  # type: ignore[attr-defined]
    wrappers = [forward for forward in map(wrapped_forward, model.modules()) if forward is not None]
    meshes += [cells["mesh"] for cells in map(cells_of, wrappers) if "mesh" in cells]
    if not meshes:
        return None
    mesh = meshes[0]
    whole: Any = getattr(model, "_device_mesh", None)
    for checked in (mesh, *((whole,) if whole is not None else ())):
        names = checked.mesh_dim_names or ()
        others = [name for name, size in zip(names, checked.shape, strict=False) if name != "tp" and size > 1]
        if others or (checked.ndim > 1 and "tp" not in names):
            raise CaptureError(f"the model is distributed by {', '.join(others) or 'a mesh without names'}, too")
    return Processes(mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))


# -- one distributed module -----------------------------------------------------------------------------------

SAME = -1
"""A width: the output has the shape of the first argument."""


def _shape(first: Tensor, width: int, lookup: bool) -> tuple[Any, ...]:
    if width == SAME:
        return tuple(first.shape)
    return (*first.shape, width) if lookup else (*first.shape[:-1], width)


def _fake_sharded(tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    return tensors[0].new_empty(_shape(tensors[0], width, dtype is not None), dtype=dtype)


@layer_op("glowplug::sharded", fake=_fake_sharded, splitting=True)
def sharded(layer: nn.Module, tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    """Run the forward that tensor parallelism gave a module: this process's part and the collectives.

    Args:
        layer: the module.
        tensors: its arguments.
        width: the last size of the output on this process, or `SAME`.
        dtype: for an embedding, whose output has one dimension more than its argument, the dtype of the output; None
            for other modules, whose output has the dtype of the first argument.

    Returns:
        The module's output, contiguous.

    Raises:
        NotServableError: the output has another shape or dtype.
    """
    output = layer.__dict__["forward"](*tensors)
    first = tensors[0]
    expected = _shape(first, width, dtype is not None), dtype or first.dtype
    if not isinstance(output, Tensor) or (tuple(output.shape), output.dtype) != expected:
        what = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise NotServableError(f"a distributed {type(layer).__name__} gave {what}, and not {expected[0]} {expected[1]}")
    output = output.contiguous()
    return output.clone() if any(output is tensor for tensor in tensors) else output


def sharded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward tensor parallelism replaced, by name."""
    return {name: module for name, module in model.named_modules() if wrapped_forward(module) is not None}


def entry_of(name: str, module: nn.Module) -> Callable[..., Any] | None:
    """The forward that a trace sees in a distributed module; None for that of its class.

    Raises:
        CaptureError: the shape of the output is not known.
    """
    forward = wrapped_forward(module)
    assert forward is not None
    cells = cells_of(forward)
    inner = cells.get("original_forward")
    if getattr(inner, "__func__", None) is not type(module).forward:
        raise CaptureError(f"the forward of {name} was replaced before the model was distributed")
    style = type(cells["self"]).__name__ if "self" in cells else forward.__qualname__.partition(".")[0]
    if style in _PLAIN:
        if any(is_sharded(parameter) for parameter in module.parameters()):
            raise CaptureError(f"{name} computes with distributed weights under {style}")
        return None
    return _entry(*_output(name, module, style, cells.get("self")))


def _output(name: str, module: Any, style: str, how: Any) -> tuple[int, torch.dtype | None]:
    """The `width` and `dtype` of a module's output for `glowplug::sharded`."""
    weight = module._parameters.get("weight")
    layout = getattr(how, "output_layouts", None)
    layout_type = type(layout).__name__
    if getattr(how, "use_local_output", True):
        if style in _SAME_SHAPE:
            return SAME, None
        if style == "EmbeddingParallel" and weight is not None:
            return int(module.embedding_dim), weight.dtype
        if style in _COLUMNS and weight is not None and weight.dim() == 2 and layout_type in ("Shard", "NoneType"):
            return local_of(weight).shape[0], None
        if style in ("ColwiseParallel", "RowwiseParallel") and layout_type == "Replicate":
            return int(module.out_features), None
    raise CaptureError(f"{name} is distributed in a way that glowplug can't follow: {style} {layout or ''}".strip())


@functools.lru_cache(maxsize=256)
def _entry(width: int, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    def entry(layer: nn.Module, *tensors: Tensor) -> Tensor:
        return sharded(layer, list(tensors), width, dtype)

    return entry


def world_text(processes: Processes | None) -> str:
    """The number of processes, for a program's address, which is the same in all of them."""
    if processes is None:
        return "one process"
    return f"{processes.count} of {torch.distributed.get_world_size()} processes"
