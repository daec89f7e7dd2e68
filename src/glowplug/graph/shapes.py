"""The assumptions of a trace on the sizes of its inputs, so that calls which break them are detected.

A graph captured at one size is valid for every size that meets the assumptions. Reads torch's symbolic shape
environment (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured
from glowplug.graph.sources import named


@dataclass(frozen=True)
class ShapeAssumptions:
    """Relations between the sizes of a graph's varying inputs.

    Attributes:
        dims: source of an input -> its shape. An int is a fixed size, a sympy expression a symbolic one.
        relations: conditions on the symbols that the trace or a compiler relied on.
    """

    dims: Mapping[str, tuple[Any, ...]]
    relations: tuple[Any, ...]

    def broken_by(self, shapes: Mapping[str, tuple[int, ...]], smallest: int = 0) -> str | None:
        """Why the graph is not valid for these shapes; None if it is. `smallest` is the minimum for symbolic sizes."""
        values: dict[Any, int] = {}
        for source, dims in self.dims.items():
            shape, name = shapes.get(source), named(source)
            if shape is None:
                continue
            if len(shape) != len(dims):
                return f"{name} has {len(shape)} dimensions; it was traced with {len(dims)}"
            for position, (size, dim) in enumerate(zip(shape, dims, strict=True)):
                if isinstance(dim, int):
                    if size != dim:
                        return f"dimension {position} of {name} is {size}; the trace fixed it at {dim}"
                elif size < smallest:
                    return f"dimension {position} of {name} is {size}; the program was compared at {smallest} or more"
                elif values.setdefault(dim, size) != size:
                    return f"dimension {position} of {name} is {size}, but the same size is {values[dim]} elsewhere"
        for relation in self.relations:
            outcome = relation.xreplace(values) if hasattr(relation, "xreplace") else relation
            if outcome in (False, sympy.false):
                return f"the sizes {sorted(values.values())} break {relation}, which the trace relied on"
        return None


def read_assumptions(captured: Captured, varying: set[str]) -> ShapeAssumptions:
    """Collect the assumptions inside the capture, after every step that may add one (tracing, compiling).

    Args:
        captured: the graph.
        varying: sources of the inputs that change from call to call.
    """
    tensors = {source: fake for source, fake in _values(captured) if isinstance(fake, torch.Tensor)}
    dims = {source: tuple(map(_dim, fake.shape)) for source, fake in tensors.items() if source in varying}
    environment = captured.fake_mode.shape_env
    symbols = {dim for shape in dims.values() for dim in shape if isinstance(dim, sympy.Symbol)}
    relations = [guard.expr for guard in environment.guards]
    for symbol in symbols:
        bounds = environment.var_to_range.get(symbol)
        if bounds is not None and bounds.lower > 0:
            relations.append(sympy.Ge(symbol, bounds.lower))
        if bounds is not None and bounds.upper < 2**31:
            relations.append(sympy.Le(symbol, bounds.upper))
    relations = [relation for relation in dict.fromkeys(relations) if not _only_excludes_zero_and_one(relation)]
    for relation in relations:
        if not (
            relation.free_symbols <= symbols or _is_renaming(relation, environment) or _is_fixing(relation, environment)
        ):
            raise CaptureError(f"the trace relied on {relation}, a relation of sizes that a call does not give")
    return ShapeAssumptions(dims, tuple(r for r in relations if r.free_symbols <= symbols))


def symbolic_sizes(captured: Captured) -> dict[str, Any]:
    """Source -> size, or shape, of each input whose size is symbolic. Where two captures agree in it, a symbol of one
    means what the symbol of that name means in the other."""
    found: dict[str, Any] = {}
    for source, fake in _values(captured):
        dims = tuple(map(_dim, fake.shape)) if isinstance(fake, torch.Tensor) else ()
        if isinstance(fake, torch.SymInt):
            found[source] = _dim(fake)
        elif not all(isinstance(dim, int) for dim in dims):
            found[source] = dims
    return found


def _values(captured: Captured) -> list[tuple[str, Any]]:
    """The source of each input, and the fake tensor or size that stands for it."""
    placeholders = {node.name: node for node in captured.gm.graph.nodes if node.op == "placeholder"}
    return [(entry.source, placeholders[entry.node].meta.get("example_value")) for entry in captured.inputs]


def pickled_guards(guards: Sequence[Any]) -> list[str]:
    """Guards that a fork's compilation added, for `add_guards` in its parent."""
    return [base64.b64encode(pickle.dumps(guard.expr)).decode() for guard in guards]


def add_guards(captured: Captured, pickled: Sequence[str]) -> bool:
    """Add guards to a capture. Returns False if one does not hold for the sizes of the trace, or can't be read."""
    environment = captured.fake_mode.shape_env
    try:
        return all(bool(environment.create_symboolnode(pickle.loads(base64.b64decode(each)))) for each in pickled)
    except Exception:
        return False


def _only_excludes_zero_and_one(relation: Any) -> bool:
    """Whether the relation holds for all sizes of at least 2.

    Such relations come from stride and broadcast rules, where a dim of size 1 takes another branch to the same result.
    They are not enforced, because each class of sizes (one sequence or several, one token or several) is compared with
    eager before its first use, and the tests cover each class.
    """
    if not isinstance(relation, sympy.core.relational.Relational):
        return False
    larger = {
        symbol: sympy.Symbol(f"{symbol.name}_", integer=True, nonnegative=True) + 2 for symbol in relation.free_symbols
    }
    difference = sympy.expand((relation.lhs - relation.rhs).xreplace(larger))
    holds = {
        sympy.Ne: difference.is_positive or difference.is_negative,
        sympy.Gt: difference.is_positive,
        sympy.Ge: difference.is_nonnegative,
        sympy.Lt: difference.is_negative,
        sympy.Le: difference.is_nonpositive,
    }
    return bool(holds.get(type(relation)))


def _is_renaming(relation: Any, environment: Any) -> bool:
    """Whether the relation only equates two symbols, or expressions that are equal after torch's replacements."""
    if not isinstance(relation, sympy.Eq):
        return False
    same = relation.xreplace(environment.replacements) is sympy.true
    return same or bool(relation.lhs.is_Symbol and relation.rhs.is_Symbol)


def _is_fixing(relation: Any, environment: Any) -> bool:
    """Whether the relation only fixes a symbol at a number, which then appears in every shape instead of the symbol."""
    if not (isinstance(relation, sympy.Eq) and relation.lhs.is_Symbol and relation.rhs.is_Integer):
        return False
    return bool(environment.replacements.get(relation.lhs) == relation.rhs)


def _dim(size: Any) -> Any:
    """A fixed size as an int, a symbolic one as its expression."""
    dim = size if isinstance(size, int) else size.node.expr
    return int(dim) if isinstance(dim, (int, sympy.Integer)) else dim


def as_python(relation: Any, names: Mapping[Any, str]) -> str:
    """A relation as a Python expression, with its symbols renamed to `names`."""
    renamed = {symbol: sympy.Symbol(name, integer=True, positive=True) for symbol, name in names.items()}
    return str(PythonPrinter().doprint(relation.xreplace(renamed)))
