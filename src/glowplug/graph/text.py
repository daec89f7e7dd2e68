"""A piece's graph as Python text that another process can run.

Uses fx's import block of generated code (private; checked on torch 2.11 and 2.13). Unpickling a graph module would
trace its code anew, which code that writes in place does not survive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from glowplug.errors import NotStorableError


def graph_to_text(piece: fx.GraphModule) -> str:
    """The text.

    Raises:
        NotStorableError: the graph holds constants or graphs of its own, or calls what can't be imported.
    """
    if any(node.op in ("get_attr", "call_module") for node in piece.graph.nodes):
        raise NotStorableError("the piece holds a constant, or a graph of its own")
    try:
        code = piece.graph.python_code("self")
        text = f"{_format_import_block(code.globals, sys_importer)}\n{code.src}"
        compile(text, "<piece>", "exec")
    except Exception as exc:  # importers and compilers raise errors of many classes
        raise NotStorableError(f"the piece calls what another process can't import: {exc}") from exc
    return text


def text_to_function(text: str) -> Callable[..., Any]:
    """What `graph_to_text` wrote, as a function of the piece's inputs. Runs the text."""
    names: dict[str, Any] = {}
    exec(compile(text, "<piece>", "exec"), names)
    return functools.partial(names["forward"], None)
