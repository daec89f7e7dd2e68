"""A stored program: its plan, where the objects that it is bound to lie, and what its trace relied on, as JSON.

Reading one runs no code. The pieces that it names are artifacts of their own.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch
from torch.utils._sympy import functions as torch_functions

from glowplug.errors import ArtifactError, NotStorableError
from glowplug.graph.fingerprint import Fingerprint
from glowplug.graph.shapes import ShapeAssumptions
from glowplug.graph.split import OpStep, Piece, Step, Value
from glowplug.graph.stamp import Local, Outside, Own, Previous, Reference, Stamped, Unit, UnitStep
from glowplug.ops.layer_op import find_op_by_name
from glowplug.program.plan import Plan
from glowplug.program.program import StepOutline

SCHEMA = 1
_REFERENCES: dict[str, type] = {"own": Own, "local": Local, "previous": Previous, "outside": Outside}
_NAMES = {cls: name for name, cls in _REFERENCES.items()}


@dataclass(frozen=True)
class Place:
    """Where an object that a program is bound to lies in the model.

    Attributes:
        kind: `"tensor"` (a parameter, buffer or attribute), `"handle"`, or `"unread"` (nobody looks at it).
        path: its qualified name; empty when unread.
    """

    kind: str
    path: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a program that a warm start needs, and its pieces.

    Attributes:
        plan: how it runs.
        places: graph value -> where its object lies, for what lies outside the stack.
        stack: qualified name of the stack of a stamped model; None for a full trace.
        handles: paths in a layer that are handles.
        assumptions: what its trace assumed of sizes.
        output_type: `module:qualified name` of the class of the model's output.
        reads: sources of everything in Python that the trace depended on.
        globals: source of a plain value outside the model that the trace read -> the value, as text.
        sources: name of each Python module that was traced -> SHA-256 of its file.
        addresses: digest of a piece -> what the store knows it by, where that is not the digest.
        facts: what the report says of it.
        verified: whether it was compared with eager.
    """

    plan: Plan
    places: Mapping[str, Place]
    stack: str | None
    handles: frozenset[str]
    assumptions: ShapeAssumptions
    output_type: str
    reads: tuple[str, ...]
    globals: Mapping[str, str]
    sources: Mapping[str, str]
    addresses: Mapping[str, str]
    facts: Mapping[str, Any]
    verified: bool

    def to_bytes(self) -> bytes:
        """Its form on disk.

        Raises:
            NotStorableError: something in it has none.
        """
        assumptions = {
            "dims": {k: [_size(dim) for dim in dims] for k, dims in self.assumptions.dims.items()},
            "relations": [str(relation) for relation in self.assumptions.relations],
        }
        for text, relation in zip(assumptions["relations"], self.assumptions.relations, strict=True):
            if _expression(text) != relation:
                raise NotStorableError(f"the relation of sizes {text} does not survive being written down")
        body = {
            "schema": SCHEMA,
            "plan": _plan_to_json(self.plan),
            "places": {name: [place.kind, place.path] for name, place in self.places.items()},
            "stack": self.stack,
            "handles": sorted(self.handles),
            "assumptions": assumptions,
            "output_type": self.output_type,
            "reads": list(self.reads),
            "globals": dict(self.globals),
            "sources": dict(self.sources),
            "addresses": dict(self.addresses),
            "facts": dict(self.facts),
            "verified": self.verified,
        }
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """Read its form on disk.

        Raises:
            ArtifactError: it is none, or names an op that this process does not know.
        """
        try:
            body = json.loads(content)
            if body["schema"] != SCHEMA:
                raise ArtifactError(f"it is of schema {body['schema']}, and this glowplug reads {SCHEMA}")
            assumptions = ShapeAssumptions(
                {k: tuple(map(_dim, dims)) for k, dims in body["assumptions"]["dims"].items()},
                tuple(map(_expression, body["assumptions"]["relations"])),
            )
            return cls(
                plan=_plan_from_json(body["plan"]),
                places={name: Place(*place) for name, place in body["places"].items()},
                stack=body["stack"],
                handles=frozenset(body["handles"]),
                assumptions=assumptions,
                output_type=body["output_type"],
                reads=tuple(body["reads"]),
                globals=body["globals"],
                sources=body["sources"],
                addresses=body["addresses"],
                facts=body["facts"],
                verified=body["verified"],
            )
        except ArtifactError:
            raise
        except Exception as exc:  # whatever somebody has written there
            raise ArtifactError(f"it can't be read: {type(exc).__name__}: {exc}"[:200]) from exc


# -- sizes -----------------------------------------------------------------------------------------------------


def _size(dim: Any) -> int | str:
    return dim if isinstance(dim, int) else str(dim)


def _dim(size: int | str) -> Any:
    return size if isinstance(size, int) else _expression(size)


_FUNCTIONS = {name: value for name, value in vars(torch_functions).items() if isinstance(value, type)}
_FUNCTIONS |= {name: getattr(sympy, name) for name in ("Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not")}
_FUNCTIONS |= {"Integer": sympy.Integer, "Max": torch_functions.Max, "Min": torch_functions.Min}


_OPERATORS = (ast.operator, ast.unaryop, ast.cmpop)
_NODES = (ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, *_OPERATORS)
_LONGEST_EXPRESSION = 2000
_LARGEST_POWER = 16


def _expression(text: str) -> Any:
    """A relation or expression over sizes: names of sizes, calls of sympy's functions, and arithmetic."""
    if len(text) > _LONGEST_EXPRESSION:
        raise ArtifactError("it has an expression of sizes that is too long")
    tree = ast.parse(text, "<sizes>", "eval")
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names[node.id] = _name(node.id)
        elif not isinstance(node, _NODES) or not _harmless(node):
            raise ArtifactError(f"it has an expression of sizes that is none: {text[:80]!a}")
    return sympy.sympify(eval(compile(tree, "<sizes>", "eval"), {"__builtins__": {}}, names))


def _name(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if not (name.isalnum() and name[0] in "su" and name[-1].isdigit()):
        raise ArtifactError(f"it has an expression of sizes with the name {name!a}")
    return sympy.Symbol(name, integer=True, positive=True)


def _harmless(node: ast.AST) -> bool:
    """Whether a node of an expression has no code in it that is not arithmetic, nor a number without bounds."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int, float))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
        return isinstance(power, ast.Constant) and isinstance(power.value, int) and power.value <= _LARGEST_POWER
    return not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and not node.keywords)


# -- plans -----------------------------------------------------------------------------------------------------


def _plan_to_json(plan: Plan) -> dict[str, Any]:
    if not all(found.stable for found in plan.pieces()):
        raise NotStorableError("a piece calls a function that was made inside another, which no other process can find")
    prints = list(plan.pieces())
    numbers = {found: number for number, found in enumerate(prints)}
    body: dict[str, Any] = {
        "prints": [found.digest for found in prints],
        "steps": [_step_to_json(step) for step in plan.steps],
        "of": [numbers[found] if found is not None else None for found in plan.prints],
        "outputs": list(plan.outputs),
        "arguments": dict(plan.arguments),
        "outline": [list(step.sources) for step in plan.outline],
        "stamped": None,
    }
    if plan.stamped is not None:
        body["stamped"] = {
            "units": [[_unit_step_to_json(step, numbers) for step in unit.steps] for unit in plan.stamped.units],
            "sequence": list(plan.stamped.sequence),
            "outputs": [_reference_to_json(ref) for ref in plan.stamped.outputs],
        }
    return body


def _plan_from_json(body: dict[str, Any]) -> Plan:
    prints = [Fingerprint(digest) for digest in body["prints"]]
    steps = tuple(map(_step_from_json, body["steps"]))
    of = tuple(prints[number] if number is not None else None for number in body["of"])
    stamped = None
    if body["stamped"] is not None:
        units = tuple(
            Unit(tuple(_unit_step_from_json(step, prints) for step in unit)) for unit in body["stamped"]["units"]
        )
        outputs = tuple(map(_reference_from_json, body["stamped"]["outputs"]))
        stamped = Stamped(steps, units, tuple(body["stamped"]["sequence"]), outputs)
    outline = tuple(
        StepOutline(step.op.name if isinstance(step, OpStep) else None, found, tuple(sources))
        for step, found, sources in zip(steps, of, body["outline"], strict=True)
    )
    return Plan(steps, of, tuple(body["outputs"]), body["arguments"], stamped, outline)


def _unit_step_to_json(step: UnitStep, numbers: Mapping[Fingerprint, int]) -> list[Any]:
    inputs = [[name, _reference_to_json(ref)] for name, ref in step.inputs.items()]
    of = numbers[step.found] if step.found is not None else None
    return [_step_to_json(step.step), of, inputs, step.constants]


def _unit_step_from_json(body: list[Any], prints: list[Fingerprint]) -> UnitStep:
    step, of, inputs, constants = body
    found = prints[of] if of is not None else None
    return UnitStep(_step_from_json(step), found, {name: _reference_from_json(ref) for name, ref in inputs}, constants)


def _reference_to_json(ref: Reference) -> list[Any]:
    return [_NAMES[type(ref)], *asdict(ref).values()]


def _reference_from_json(body: list[Any]) -> Reference:
    found: Reference = _REFERENCES[body[0]](*body[1:])
    return found


def _step_to_json(step: Step) -> dict[str, Any]:
    if isinstance(step, Piece):
        return {"in": list(step.inputs), "out": list(step.outputs), "layer": step.layer}
    identity = next(name for name, overload in step.op.overloads.items() if overload is step.overload)
    return {
        "op": step.op.name,
        "identity": identity,
        "args": _argument_to_json(tuple(step.args)),
        "out": list(step.outputs),
        "single": step.single,
        "layer": step.layer,
    }


def _step_from_json(body: dict[str, Any]) -> Step:
    if "op" not in body:
        return Piece(None, tuple(body["in"]), tuple(body["out"]), body["layer"])
    op = find_op_by_name(body["op"])
    if op is None:
        raise ArtifactError(f"it calls the op {body['op']}, which this process has not registered")
    args = _argument_from_json(body["args"])
    return OpStep(op, op.overloads[body["identity"]], args, tuple(body["out"]), body["single"], body["layer"])


def _argument_to_json(arg: Any) -> Any:
    if isinstance(arg, Value):
        return {"value": arg.name}
    if isinstance(arg, tuple):
        return {"tuple": [_argument_to_json(item) for item in arg]}
    if isinstance(arg, list):
        return [_argument_to_json(item) for item in arg]
    if isinstance(arg, float) and not math.isfinite(arg):
        return {"float": repr(arg)}
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return arg
    if isinstance(arg, torch.dtype):
        return {"dtype": str(arg).removeprefix("torch.")}
    if isinstance(arg, torch.device):
        return {"device": str(arg)}
    raise NotStorableError(f"an op has an argument of type {type(arg).__name__}")


def _argument_from_json(body: Any) -> Any:
    if isinstance(body, list):
        return [_argument_from_json(item) for item in body]
    if not isinstance(body, dict):
        return body
    ((kind, content),) = body.items()
    if kind == "value":
        return Value(content)
    if kind == "tuple":
        return tuple(_argument_from_json(item) for item in content)
    if kind == "float":
        return float(content)
    if kind == "dtype":
        return dtype_from_name(content)
    return torch.device(content)


def dtype_from_name(name: str) -> torch.dtype:
    """A dtype of torch.

    Raises:
        ArtifactError: there is none of this name.
    """
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"torch has no dtype {name[:40]!a}")
    return found
