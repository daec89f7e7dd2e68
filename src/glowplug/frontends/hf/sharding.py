"""Tensor parallelism as transformers does it: which modules of a model are distributed, what traces see in their place,
and how the processes agree. Checked on transformers 5.23.

A distributed module's weights are DTensors, and its `forward` is a closure that runs this process's part and the
collectives; between such modules all tensors are plain. In a trace each of them is a call of `glowplug::sharded`.
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
"""Styles that do something to gradients alone."""


class Processes:
    """The processes that run one model together.

    Args:
        group: their process group.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.count = torch.distributed.get_world_size(group)

    def gather(self, mine: Any) -> list[Any]:
        """What each of them brings, in the order of their ranks. All must call it."""
        found = [None] * self.count
        torch.distributed.all_gather_object(found, mine, group=self.group)
        return found

    def agree(self, reason: str | None) -> str | None:
        """None if all of them have no reason against something; else the same reason everywhere. All must call it."""
        reasons = self.gather(reason)
        return next((f"process {rank}: {found}" for rank, found in enumerate(reasons) if found is not None), None)


def processes_of(model: nn.Module) -> Processes | None:
    """The processes that the model is distributed over by tensor parallelism; None when this one holds it all.

    Raises:
        CaptureError: it is distributed in other ways, too.
    """
    meshes = [parameter.device_mesh for parameter in model.parameters() if is_sharded(parameter)]  # type: ignore[attr-defined]
    wrappers = [found for found in map(wrapped_forward, model.modules()) if found is not None]
    meshes += [cells["mesh"] for cells in map(cells_of, wrappers) if "mesh" in cells]
    if not meshes:
        return None
    mesh = meshes[0]
    whole: Any = getattr(model, "_device_mesh", None)
    for found in (mesh, *((whole,) if whole is not None else ())):
        names = found.mesh_dim_names or ()
        others = [name for name, size in zip(names, found.shape, strict=False) if name != "tp" and size > 1]
        if others or (found.ndim > 1 and "tp" not in names):
            raise CaptureError(f"the model is distributed by {', '.join(others) or 'a mesh without names'}, too")
    return Processes(mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))


# -- one distributed module -----------------------------------------------------------------------------------

SAME = -1
"""As a width: of the first tensor's shape."""


def _shape(first: Tensor, width: int, lookup: bool) -> tuple[Any, ...]:
    if width == SAME:
        return tuple(first.shape)
    return (*first.shape, width) if lookup else (*first.shape[:-1], width)


def _fake_sharded(tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    return tensors[0].new_empty(_shape(tensors[0], width, dtype is not None), dtype=dtype)


@layer_op("glowplug::sharded", fake=_fake_sharded, splitting=True)
def sharded(layer: nn.Module, tensors: list[Tensor], width: int, dtype: torch.dtype | None) -> Tensor:
    """Run the forward that tensor parallelism gave a module: its part on this process, and what makes it whole.

    Args:
        layer: the module.
        tensors: its arguments.
        width: the last size of its output on this process; `SAME`: the output has the first argument's shape.
        dtype: of the output of a module that looks up its argument, which adds a dimension; None: any other module,
            whose output has the first argument's dtype.

    Returns:
        The module's output, contiguous.

    Raises:
        NotServableError: the output has another form.
    """
    output = layer.__dict__["forward"](*tensors)
    first = tensors[0]
    expected = _shape(first, width, dtype is not None), dtype or first.dtype
    if not isinstance(output, Tensor) or (tuple(output.shape), output.dtype) != expected:
        found = f"{tuple(output.shape)} {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise NotServableError(
            f"a distributed {type(layer).__name__} gave {found}, and not {expected[0]} {expected[1]}"
        )
    output = output.contiguous()
    return output.clone() if any(output is tensor for tensor in tensors) else output


def sharded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules to which tensor parallelism gave a forward, by name."""
    return {name: module for name, module in model.named_modules() if wrapped_forward(module) is not None}


def entry_of(name: str, module: nn.Module) -> Callable[..., Any] | None:
    """What a trace sees in the place of a distributed module's forward; None: its class's own forward.

    Raises:
        CaptureError: the form of its output can't be told.
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
    return _entry(*_form(name, module, style, cells.get("self")))


def _form(name: str, module: Any, style: str, how: Any) -> tuple[int, torch.dtype | None]:
    """Width and dtype of a module's output, as `glowplug::sharded` wants them."""
    weight = module._parameters.get("weight")
    layout = getattr(how, "output_layouts", None)
    kind = type(layout).__name__
    if getattr(how, "use_local_output", True):
        if style in _SAME_SHAPE:
            return SAME, None
        if style == "EmbeddingParallel" and weight is not None:
            return int(module.embedding_dim), weight.dtype
        if style in _COLUMNS and weight is not None and weight.dim() == 2 and kind in ("Shard", "NoneType"):
            return local_of(weight).shape[0], None
        if style in ("ColwiseParallel", "RowwiseParallel") and kind == "Replicate":
            return int(module.out_features), None
    raise CaptureError(f"{name} is distributed in a way that glowplug can't follow: {style} {layout or ''}".strip())


@functools.lru_cache(maxsize=256)
def _entry(width: int, dtype: torch.dtype | None) -> Callable[..., Tensor]:
    def entry(layer: nn.Module, *tensors: Tensor) -> Tensor:
        return sharded(layer, list(tensors), width, dtype)

    return entry


def world_text(processes: Processes | None) -> str:
    """Over how many processes a model is distributed, for its address; not which of them this one is."""
    if processes is None:
        return "one process"
    return f"{processes.count} of {torch.distributed.get_world_size()} processes"
