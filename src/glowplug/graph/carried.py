"""Carries graphs of a capture, with their symbolic sizes, to another process that compiles them. Uses `GraphPickler`
(private; checked on torch 2.11 and 2.13).

Tensors are carried as a shape, strides, a dtype and a device: compilation asks for no more, unless a graph writes to
one of two inputs that share memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from glowplug.errors import NotCarriableError, UnsupportedTorchError
from glowplug.graph.split import may_mutate

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx._graph_pickler import Options as _Options
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"glowplug can't find a part of torch that pickles graphs ({exc}). It was checked on torch 2.11 and 2.13."
    ) from exc

_VALUE, _CARRIED = "example_value", "glowplug_carried"
"""Names of a node's metadata: the value that Dynamo noted, and its carried form."""


@dataclass(frozen=True)
class _Tensor:
    """A fake tensor's carried form."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def carry(graphs: Sequence[fx.GraphModule]) -> bytes:
    """Graphs of one capture as bytes, with the values of their nodes.

    Raises:
        NotCarriableError: a graph holds modules or constants, has inputs that are not plain tensors or sizes, or writes
            to memory that two of its inputs share.
    """
    options = _Options(ops_filter=None, node_metadata_key_filter=_is_carried)
    try:
        return GraphPickler.dumps([_copy(gm) for gm in graphs], options)
    except NotCarriableError:
        raise
    except Exception as exc:  # whatever torch can't pickle
        raise NotCarriableError(f"{type(exc).__name__}: {exc}") from exc


def unpack(content: bytes) -> tuple[FakeTensorMode, list[fx.GraphModule]]:
    """The graphs of `carry`, and the mode of their fake tensors. This executes code from the bytes."""
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    graphs: Any = GraphPickler.loads(content, mode)
    with mode, environment.suppress_guards():
        for gm in graphs:
            for node in gm.graph.nodes:
                if _CARRIED in node.meta:
                    node.meta = {_VALUE: _map(node.meta[_CARRIED], _Tensor, _made)}
    return mode, graphs


def _is_carried(key: str) -> bool:
    return key == _CARRIED


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph whose nodes have only values, in carried form."""
    calls = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    if any(node.op in ("get_attr", "call_module") for node in calls):
        raise NotCarriableError("it holds modules or constants")
    inputs = [node.meta.get(_VALUE) for node in gm.graph.nodes if node.op == "placeholder"]
    if not all(type(value) is FakeTensor or isinstance(value, (int, float, torch.SymInt)) for value in inputs):
        raise NotCarriableError("it has inputs that are not tensors or sizes")
    memory = Counter(value.untyped_storage()._cdata for value in inputs if isinstance(value, FakeTensor))
    if max(memory.values(), default=0) > 1 and any(map(may_mutate, calls)):
        raise NotCarriableError("it may write to memory that two of its inputs share")
    if not all(map(_begins_its_memory, inputs)):
        raise NotCarriableError("it has an input that does not begin where its memory does")
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        node.meta = {_CARRIED: _map(node.meta.get(_VALUE), torch.Tensor, _carried)}
    return fx.GraphModule(nn.Module(), graph)


def _map(value: Any, kind: type, form: Callable[[Any], Any]) -> Any:
    """A value of a node in which each tensor is in another form; None in place of what can't be carried."""
    if isinstance(value, kind):
        return form(value)
    if isinstance(value, (tuple, list)):
        mapped = [_map(each, kind, form) for each in value]
        return tuple(mapped) if isinstance(value, tuple) else mapped
    return value if isinstance(value, (int, float, str, torch.SymInt)) else None


def _carried(tensor: torch.Tensor) -> _Tensor | None:
    """Where a tensor begins in its memory is not carried."""
    if type(tensor) is not FakeTensor or tensor.layout != torch.strided:
        return None
    return _Tensor(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def _begins_its_memory(value: Any) -> bool:
    """Whether an input is a plain tensor at the beginning of its memory, or no tensor. Asks for no guard."""
    if not isinstance(value, torch.Tensor):
        return True
    plain = value.layout == torch.strided and not value.is_conj() and not value.is_neg()
    return plain and str(value.storage_offset()) == "0"


def _made(tensor: _Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride, dtype=tensor.dtype, device=tensor.device)
