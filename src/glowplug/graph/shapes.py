"""What a trace assumed of the sizes of its inputs, so that a call which breaks an assumption is noticed.

A graph captured at one size serves every size for which these hold. Reads torch's symbolic shape environment (private;
checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from glowplug.graph.capture import Captured


@dataclass(frozen=True)
class ShapeAssumptions:
    """Relations between the sizes of a graph's varying inputs.

    Attributes:
        dims: source of an input -> its shape; an int is a fixed size, a sympy expression a symbolic one.
        relations: conditions over the symbols that the trace or a compiler relied on.
    """

    dims: Mapping[str, tuple[Any, ...]]
    relations: tuple[Any, ...]

    def broken_by(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why a call with these shapes can't be served; None when it can."""
        values: dict[Any, int] = {}
        for source, dims in self.dims.items():
            given = shapes.get(source)
            if given is None:
                continue
            if len(given) != len(dims):
                return f"{source} has {len(given)} dimensions; it was traced with {len(dims)}"
            for position, (size, dim) in enumerate(zip(given, dims, strict=True)):
                if isinstance(dim, int):
                    if size != dim:
                        return f"dimension {position} of {source} is {size}; the trace fixed it at {dim}"
                elif values.setdefault(dim, size) != size:
                    return f"dimension {position} of {source} is {size}, but the same size is {values[dim]} elsewhere"
        for relation in self.relations:
            outcome = relation.xreplace(values) if hasattr(relation, "xreplace") else relation
            if outcome in (False, sympy.false):
                return f"the sizes {sorted(values.values())} break {relation}, which the trace relied on"
        return None


def read_assumptions(captured: Captured, varying: set[str]) -> ShapeAssumptions:
    """Collect the assumptions once everything that may add one (tracing, compiling) has run.

    Args:
        captured: the graph, inside its capture.
        varying: sources of the inputs that change from call to call.
    """
    dims: dict[str, tuple[Any, ...]] = {}
    placeholders = {node.name: node for node in captured.gm.graph.nodes if node.op == "placeholder"}
    for entry in captured.inputs:
        fake = placeholders[entry.node].meta.get("example_value")
        if entry.source in varying and isinstance(fake, torch.Tensor):
            dims[entry.source] = tuple(_dim(size) for size in fake.shape)
    environment = captured.fake_mode.shape_env
    symbols = {dim for shape in dims.values() for dim in shape if isinstance(dim, sympy.Symbol)}
    relations = []
    for guard in environment.guards:
        if guard.expr.free_symbols <= symbols:
            relations.append(guard.expr)
    for symbol in symbols:
        bounds = environment.var_to_range.get(symbol)
        if bounds is not None and bounds.lower > 2:
            relations.append(sympy.Ge(symbol, bounds.lower))
        if bounds is not None and bounds.upper < 2**31 and bounds.upper.is_integer:
            relations.append(sympy.Le(symbol, bounds.upper))
    return ShapeAssumptions(dims, tuple(dict.fromkeys(relations)))


def _dim(size: Any) -> Any:
    return (
        size.node.expr
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
        else (int(size) if isinstance(size, int) else size.node.expr)
    )
