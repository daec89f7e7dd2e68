"""Serialises a piece's graph, and loads it as a callable. Uses `_forward_from_src` (private; checked on torch 2.11 and
2.13).

FX unpickles a graph by tracing its Python code again, which fails if the code assigns to an item of a tensor, as blocks
of experts do. Here the code runs without another trace.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _forward_from_src


def graph_to_bytes(piece: fx.GraphModule) -> bytes:
    """Serialise a piece's graph without the trace's metadata."""
    bare = fx.GraphModule(piece, piece.graph)
    bare.meta.clear()
    _, (body, imports) = bare.__reduce__()
    return pickle.dumps((body, imports))


def graph_from_bytes(content: bytes) -> Callable[..., Sequence[Any]]:
    """Load the uncompiled piece. This executes code from the bytes."""
    body, imports = pickle.loads(content)
    forward: Any = _forward_from_src(imports + body["_code"], {})
    module = nn.Module()
    module.__dict__.update(body)
    return functools.partial(forward, module)
