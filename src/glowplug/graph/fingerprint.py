"""A piece's fingerprint: the hash of its canonical form. Pieces with equal fingerprints share one compiled piece.

The canonical form drops names (nodes and symbols are numbered in order of appearance) and keeps ops, constants, shapes,
dtypes, strides, devices and symbolic relations.
"""

from __future__ import annotations

import enum
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from glowplug.errors import CaptureError
from glowplug.layers.handle import LayerHandle

_SYMBOL = re.compile(r"\b[a-z]{1,3}\d+\b")


@dataclass(frozen=True)
class Line:
    """One node in canonical form.

    Attributes:
        target: the op or function, or `"input"`, or `"return"`.
        args: its arguments: node references as `%n`, keyword arguments as `name=value`.
        meta: its result: dtype, shape, device, strides.
    """

    target: str
    args: tuple[str, ...]
    meta: str

    def __str__(self) -> str:
        return f"{self.target}({', '.join(self.args)}) : {self.meta}"


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A piece's canonical form. Fingerprints are equal if their digests are.

    Attributes:
        digest: SHA-256 of the lines, in hex.
        lines: one line per node, in order, for `glowplug explain`. Empty for a stored program.
        stable: whether an equal piece has the same digest in another process.
    """

    digest: str
    lines: tuple[Line, ...] = ()
    stable: bool = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return "\n".join(f"%{number} = {line}" for number, line in enumerate(self.lines))


def fingerprint(gm: fx.GraphModule) -> Fingerprint:
    """Fingerprint one piece.

    Raises:
        CaptureError: the piece has a constant without a canonical form.
    """
    return _Canonical(gm).fingerprint()


class _Canonical:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes: dict[fx.Node, str] = {}
        self.symbols: dict[str, str] = {}
        self.stable = True

    def fingerprint(self) -> Fingerprint:
        lines = []
        for node in self.gm.graph.nodes:
            self.nodes[node] = f"%{len(self.nodes)}"
            args = [self.text(arg) for arg in node.args]
            args += [f"{key}={self.text(value)}" for key, value in sorted(node.kwargs.items())]
            if node.op == "placeholder":
                lines.append(Line("input", (), self.meta(node)))
            elif node.op == "output":
                lines.append(Line("return", tuple(args), ""))
            else:
                lines.append(Line(self.target(node), tuple(args), self.meta(node)))
        text = "\n".join(map(str, lines))
        return Fingerprint(hashlib.sha256(text.encode()).hexdigest(), tuple(lines), self.stable)

    def target(self, node: fx.Node) -> str:
        if node.op == "call_function":
            return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else self.function(node.target)
        if node.op == "get_attr":
            return f"get_attr {self.attribute(str(node.target))}"
        return f"{node.op} {node.target}"

    def function(self, target: Any) -> str:
        module = getattr(target, "__module__", "") or ""
        name = str(getattr(target, "__qualname__", None) or getattr(target, "__name__", repr(target)))
        # Functions defined in other functions can share a name, so the object itself is part of the text.
        self.stable = self.stable and "<" not in name
        return f"{module}.{name}{f' {id(target)}' if '<' in name else ''}"

    def attribute(self, path: str) -> str:
        value: Any = self.gm
        for part in path.split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            inner = fingerprint(value)
            self.stable = self.stable and inner.stable
            return f"graph {inner.digest}"
        if isinstance(value, torch.Tensor):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            return f"constant {self.tensor(value)} {hashlib.sha256(data).hexdigest()}"
        raise CaptureError(f"a piece holds a {type(value).__name__} ({path}), which has no canonical form")

    def meta(self, node: fx.Node) -> str:
        return self.value(node.meta.get("example_value"))

    def value(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return f"size {self.symbolic(value)}"
        if isinstance(value, (tuple, list)):
            return f"({', '.join(self.value(item) for item in value)})"
        if value is None or isinstance(value, (int, float, bool, str)):
            return repr(value)
        real = getattr(value, "real_obj", value)
        return "handle" if isinstance(real, LayerHandle) else type(real).__name__

    def tensor(self, tensor: torch.Tensor) -> str:
        shape = ", ".join(self.symbolic(size) for size in tensor.shape)
        parts = [f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]", str(tensor.device)]
        if tensor.layout is torch.strided:
            parts.append(f"stride({', '.join(self.symbolic(size) for size in tensor.stride())})")
        else:
            parts.append(str(tensor.layout))
        flags = {"conj": tensor.is_conj(), "neg": tensor.is_neg(), "inference": tensor.is_inference()}
        parts += [flag for flag, is_set in flags.items() if is_set]
        names, context = tensor.__tensor_flatten__() if is_traceable_wrapper_subclass(tensor) else ((), None)
        if names:  # a tensor subclass, such as a quantized weight
            inner = ", ".join(f"{name}: {self.value(getattr(tensor, name))}" for name in names)
            parts.append(f"{self.function(type(tensor))} of {inner} {context!r}")
            self.stable = self.stable and " at 0x" not in repr(context)
        return " ".join(parts)

    def symbolic(self, size: Any) -> str:
        if isinstance(size, (int, float, bool)):
            return repr(size)
        return _SYMBOL.sub(
            lambda match: self.symbols.setdefault(match[0], f"n{len(self.symbols)}"), str(size.node.expr)
        )

    def text(self, arg: Any) -> str:
        if isinstance(arg, fx.Node):
            return self.nodes[arg]
        if isinstance(arg, tuple):
            return f"({', '.join(self.text(item) for item in arg)})"
        if isinstance(arg, list):
            return f"[{', '.join(self.text(item) for item in arg)}]"
        if isinstance(arg, dict):
            return f"{{{', '.join(f'{self.text(key)}: {self.text(value)}' for key, value in arg.items())}}}"
        if isinstance(arg, slice):
            return f"slice({self.text(arg.start)}, {self.text(arg.stop)}, {self.text(arg.step)})"
        if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.symbolic(arg)
        if arg is None or arg is Ellipsis or isinstance(arg, (bool, int, float, complex, str, enum.Enum)):
            return repr(arg)
        if isinstance(arg, (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)):
            return repr(arg)
        if callable(arg):
            return self.function(arg)
        raise CaptureError(f"a piece holds a constant of type {type(arg).__name__}, which has no canonical form")
