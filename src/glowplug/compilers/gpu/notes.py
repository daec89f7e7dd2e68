"""Lets torch and Triton compile for a GPU in a fork of a process that already uses it. A fork must not call the GPU's
driver.

Compilation only asks about the GPU, so a fork answers from what its parent noted. If a fork calls the driver
nonetheless, it fails, and its parent does the work. Uses private parts of torch and Triton; checked on torch 2.11 with
Triton 3.6.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """What compilation asks about the NVIDIA GPUs of a process.

    Attributes:
        current: the index of the current one.
        properties: those of each GPU.
        capabilities: the compute capability of each.
        names: the name of each.
    """

    current: int
    properties: tuple[Any, ...]
    capabilities: tuple[tuple[int, int], ...]
    names: tuple[str, ...]

    @classmethod
    def note(cls) -> Gpu:
        """Note them in this process."""
        gpus = range(torch.cuda.device_count())
        return cls(
            torch.cuda.current_device(),
            tuple(map(torch.cuda.get_device_properties, gpus)),
            tuple(map(torch.cuda.get_device_capability, gpus)),
            tuple(map(torch.cuda.get_device_name, gpus)),
        )

    def stand_in(self) -> None:
        """In a fork: let torch answer from these notes, for as long as the fork lives."""
        from torch._subclasses import fake_tensor

        state = torch.zeros(16, dtype=torch.uint8, device="cpu")
        for module in (torch.cuda, torch.cuda.random):
            vars(module).update(
                current_device=lambda: self.current,
                get_rng_state=lambda device="cuda": state,
                set_rng_state=lambda new_state, device="cuda": None,
            )
        vars(torch.cuda).update(
            _is_in_bad_fork=lambda: False,
            _lazy_init=lambda: None,
            _exchange_device=lambda index: self.current,
            _maybe_exchange_device=lambda index: self.current,
            is_available=lambda: True,
            is_initialized=lambda: True,
            device_count=lambda: len(self.names),
            synchronize=lambda device=None: None,
            get_device_properties=lambda device=None: self.properties[self._index(device)],
            get_device_capability=lambda device=None: self.capabilities[self._index(device)],
            get_device_name=lambda device=None: self.names[self._index(device)],
        )
        vars(torch.accelerator).update(is_available=lambda: False)  # else Dynamo asks for its stream
        vars(fake_tensor).update(init_gpu_context=lambda device: None)
        _index_without_guard()
        _call_without_guard()

    def stand_in_for_compilers(self) -> None:
        """The same for Inductor and Triton."""
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaDriver, CudaLauncher
        from triton.runtime.driver import driver

        notes = self
        properties, (major, minor) = self.properties[self.current], self.capabilities[self.current]
        limits = {
            "max_shared_mem": getattr(properties, "shared_memory_per_block_optin", 0),
            "max_num_regs": properties.regs_per_multiprocessor,
            "multiprocessor_count": properties.multi_processor_count,
            "warpSize": properties.warp_size,
        }

        class Driver(CudaDriver):
            """Triton's driver without one."""

            def __init__(self) -> None:
                self.utils = SimpleNamespace(get_device_properties=lambda device: limits)
                self.launcher_cls = CudaLauncher
                self.get_current_device = lambda: notes.current
                self.set_current_device = lambda device: None
                self.get_current_stream = lambda device=None: 0
                self.get_device_capability = lambda device=None: notes.capabilities[notes._index(device)]

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 10 * major + minor, properties.warp_size)

        driver.set_active(Driver())
        _make_patterns_on_cpu()
        _fold_constants_on_cpu()

    def _index(self, device: Any) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index if device is not None else None
        return self.current if index is None else int(index)


@functools.cache
def driver_folder() -> str:
    """The name of the folder in Triton's cache with the helper of its driver, which is built if it is missing."""
    from triton.backends.nvidia.driver import CudaUtils

    helper: Any = CudaUtils().load_binary
    return Path(helper.__self__.__file__).parent.name


def _index_without_guard() -> None:
    """Index tensors by the ops that torch's own indexing comes down to: that one asks the driver for the device."""
    own = torch.Tensor.__getitem__

    def getitem(tensor: Any, index: Any) -> Any:
        items = list(index) if isinstance(index, tuple) else [index]
        plain = (int, torch.SymInt, slice, type(None), type(Ellipsis), torch.Tensor)
        masks = (torch.bool, torch.uint8)
        is_plain = all(isinstance(item, plain) and not isinstance(item, bool) for item in items)
        if not is_plain or any(getattr(item, "dtype", None) in masks for item in items):
            return own(tensor, index)
        at = next((place for place, item in enumerate(items) if item is Ellipsis), None)
        if at is not None:
            missing = tensor.dim() - sum(item is not None and item is not Ellipsis for item in items)
            items[at : at + 1] = [slice(None)] * missing
        dim = 0
        chosen: dict[int, Any] = {}
        for item in items:
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(item, slice):
                if item != slice(None):
                    tensor = torch.ops.aten.slice.Tensor(tensor, dim, item.start, item.stop, item.step or 1)
            elif isinstance(item, torch.Tensor):
                chosen[dim] = item
            else:
                tensor = tensor.select(dim, item)
                dim -= 1
            dim += 1
        if not chosen:
            return tensor
        return torch.ops.aten.index.Tensor(tensor, [chosen.get(at) for at in range(max(chosen) + 1)])

    torch.Tensor.__getitem__ = getitem  # type: ignore[method-assign]


def _call_without_guard() -> None:
    """The same for methods whose bindings torch wrote by hand."""
    aten = torch.ops.aten

    def contiguous(tensor: Any, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        laid_out = tensor.is_contiguous(memory_format=memory_format)
        return tensor if laid_out else aten.clone.default(tensor, memory_format=memory_format)

    def copy_(tensor: Any, source: Any, non_blocking: bool = False) -> Any:
        return aten.copy_.default(tensor, source, non_blocking)

    for name, method in {"__invert__": aten.bitwise_not.default, "contiguous": contiguous, "copy_": copy_}.items():
        setattr(torch.Tensor, name, lambda tensor, *args, run=method, **kwargs: run(tensor, *args, **kwargs))


def _make_patterns_on_cpu() -> None:
    """Make the patterns by which Inductor rewrites graphs of tensors on the CPU, unless the parent has made them."""
    from torch._inductor.fx_passes import joint_graph

    own = joint_graph.lazy_init

    def lazy_init(device: torch.device | None = None) -> None:
        if not own.cache_info().currsize:
            own(torch.device("cpu"))

    joint_graph.lazy_init = lazy_init


def _fold_constants_on_cpu() -> None:
    """Compute the constants that Inductor replaces by numbers, such as a mask's minus infinity, on the CPU."""
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder

    own = UniformValueConstantFolder._deduce_value

    def deduce_value(folder: Any, node: Any) -> Any:
        kwargs = node.kwargs
        if torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return own(folder, node)
        node.kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return own(folder, node)
        finally:
            node.kwargs = kwargs

    UniformValueConstantFolder._deduce_value = deduce_value
