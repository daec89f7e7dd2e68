"""`@layer_op`: a custom op that receives its layer object, while graphs contain no layer's identity.

Registration uses `torch.library.Library` rather than `torch.library.custom_op`: glowplug serves inference, where
`custom_op`'s autograd wrapper would only cost time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from glowplug.errors import LayerLookupError, UsageError
from glowplug.layers.context import current_context
from glowplug.layers.handle import HANDLE_TYPE_NAME
from glowplug.layers.other_identities import check_calls, find_baked, find_ordered, note_call
from glowplug.layers.reads import HANDLE_ATTR, OTHER_ATTR
from glowplug.layers.registry import LayerRegistry
from glowplug.ops.tape import current_tape


@functools.cache
def _library(namespace: str) -> torch.library.Library:
    """One library per namespace; it must live as long as the process."""
    return torch.library.Library(namespace, "FRAGMENT")


_IDENTITIES: dict[str, tuple[str, Callable[[str, Any], nn.Module]]] = {
    "hoisted": (f"{HANDLE_TYPE_NAME} layer", lambda _op, handle: handle.resolve()),
    "baked": ("str layer", lambda _op, name: find_baked(name)),
    "ordered": ("str kind", lambda op, kind: find_ordered(current_context(), op, kind)),
}
"""How a traced call identifies its layer: the first argument in the op's schema, and how it finds the layer."""

_by_overload: dict[Any, LayerOp] = {}
_by_name: dict[str, LayerOp] = {}


@dataclass(frozen=True, eq=False)
class LayerOp:
    """A registered layer op, created by `layer_op`.

    Attributes:
        name: qualified name, `"namespace::op"`.
        fn: the author's function, `fn(layer, *tensors)`.
        splitting: whether the graph is cut at this op.
        layer_type: the class of the layers, from the annotation of `fn`'s first parameter; None if not annotated.
        overloads: identity -> the torch overload that traced calls use.
    """

    name: str
    fn: Callable[..., Any]
    splitting: bool
    layer_type: type[nn.Module] | None
    overloads: dict[str, Any] = field(default_factory=dict)

    def resolve(self, overload: Any, args: Sequence[Any]) -> tuple[Callable[[], nn.Module], Sequence[Any]]:
        """A function that finds the layer of a traced call, and the arguments for `fn` after the layer."""
        if overload is self.overloads["hoisted"]:
            return args[0].resolve, args[1:]
        find = next(_IDENTITIES[name][1] for name, known in self.overloads.items() if known is overload)
        return functools.partial(find, self.name, args[0]), args[1:]

    def direct(self, overload: Any) -> Callable[..., Any]:
        """A traced call as a plain Python function: without the dispatcher, so that gradients flow."""

        def call(*args: Any) -> Any:
            find_layer, rest = self.resolve(overload, args)
            return self.fn(find_layer(), *rest)

        return call


def layer_op(
    name: str,
    *,
    fake: Callable[..., Any],
    mutates: Sequence[str] = (),
    splitting: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a function of a layer object and tensors into a custom op, without any layer's identity in graphs.

    The function's first parameter is the layer object; annotate it with the layer's class. Annotate the others and the
    result with types that `torch.library.infer_schema` supports (`Tensor`, `Tensor | None`, `list[Tensor]`, `int`,
    `float`, `str`, ...). Outside a trace the call is a plain Python call. In a trace it becomes one opaque node.

    Args:
        name: `"namespace::op"`.
        fake: `fake(*tensors)` (without the layer) returns outputs of the right shape, dtype and device.
        mutates: names of the tensor parameters that the function writes to.
        splitting: cut the graph at this op, so that it runs between two compiled pieces and is called directly.

    Returns:
        A decorator. The decorated function is called as `fn(layer, *tensors)`, in eager and in traced code.

    Raises:
        UsageError: `name` is not of the form `namespace::op` or is taken, or the schema can't be inferred.
        LayerLookupError: at a traced call, if the layer was never registered.

    Example:
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.randn(4, 4))
        ...
        ...     def forward(self, x):
        ...         return apply_experts(self, x)
        >>> @layer_op("docs::apply_experts", fake=lambda x: torch.empty_like(x))
        ... def apply_experts(layer: Experts, x: torch.Tensor) -> torch.Tensor:
        ...     return x @ layer.weight  # any Python, any kernel: it is never traced
    """
    namespace, separator, op = name.partition("::")
    if not (separator and namespace.isidentifier() and op.isidentifier()):
        raise UsageError(f"an op's name has the form 'namespace::op', not {name!r}")
    if name in _by_name:
        raise UsageError(f"the op {name!r} is already registered; choose another name")

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        signature, layer_type = _without_layer(fn, name)
        schema = _schema(signature, name, tuple(mutates))
        library = _library(namespace)
        registered = LayerOp(name, fn, splitting, layer_type)

        parameters = list(signature.parameters)
        writes = {parameters.index(written) for written in mutates if written in parameters}

        def run(find: Callable[[str, Any], nn.Module], first: Any, *args: Any) -> Any:
            tape = current_tape()
            if tape is None:
                return fn(find(name, first), *args)
            return tape.call(name, first, functools.partial(find, name, first), fn, args, writes)

        def fake_of_any_identity(_identity: Any, *args: Any) -> Any:
            return fake(*args)

        for identity, (first, find) in _IDENTITIES.items():
            head = first + (", " if not schema.startswith("()") else "")
            library.define(f"{op}.{identity}({head}{schema[1:]}")
            library.impl(f"{op}.{identity}", functools.partial(run, find), "CompositeExplicitAutograd")
            torch.library.register_fake(f"{name}.{identity}", fake_of_any_identity, lib=library)
            overload = getattr(getattr(getattr(torch.ops, namespace), op), identity)
            registered.overloads[identity] = overload
            _by_overload[overload] = registered
        _by_name[name] = registered
        hoisted, baked, ordered = registered.overloads.values()

        def call(layer: nn.Module, *args: Any) -> Any:
            if not torch.compiler.is_compiling():
                return fn(layer, *args)
            handle = getattr(layer, HANDLE_ATTR, None)
            if handle is None:
                raise LayerLookupError(
                    f"{name} was traced for a layer that is not registered. Call glowplug.register_layers(model) "
                    "before torch.compile, or use glowplug.compile(model)."
                )
            other = getattr(layer, OTHER_ATTR)
            if other is None:
                return hoisted(handle, *args)
            if other.identity == "baked":
                return baked(other.text, *args)
            return ordered(note_call(name, other.text, other.kind), *args)

        call.__name__, call.__doc__, call.__module__ = fn.__name__, fn.__doc__, fn.__module__
        call.layer_op = registered  # type: ignore[attr-defined]
        return call

    return decorate


def find_layer_op(target: Any) -> LayerOp | None:
    """The layer op of an FX node's target, or None."""
    try:
        return _by_overload.get(target)
    except TypeError:  # an unhashable target
        return None


def find_op_by_name(name: str) -> LayerOp | None:
    """The layer op with this qualified name, or None."""
    return _by_name.get(name)


def known_layer_ops() -> tuple[LayerOp, ...]:
    """Every registered layer op."""
    return tuple(_by_name.values())


def order_layers(registry: LayerRegistry) -> None:
    """Set the creation order of the layers of every op whose author annotated the layer's class."""
    for op in known_layer_ops():
        names = [name for name in registry if op.layer_type and isinstance(registry[name], op.layer_type)]
        if names:
            registry.set_order(op.name, names)


def check_traced_order(gm: torch.fx.GraphModule) -> None:
    """Check that a graph's ordered calls match the creation order of the layers; see `check_calls`.

    Raises:
        LayerOrderError: they do not match.
    """
    for op in known_layer_ops():
        calls = sum(node.target is op.overloads["ordered"] for node in gm.graph.nodes)
        if calls:
            check_calls(op.name, calls)


def _without_layer(fn: Callable[..., Any], name: str) -> tuple[inspect.Signature, type[nn.Module] | None]:
    try:
        signature = inspect.signature(fn, eval_str=True)
    except NameError as exc:
        raise UsageError(
            f"{name}: an annotation of the function can't be looked up ({exc}); define it at module level"
        ) from exc
    parameters = list(signature.parameters.values())
    if not parameters:
        raise UsageError(f"{name}: the function's first parameter must be the layer object")
    annotation = parameters[0].annotation
    is_layer_class = isinstance(annotation, type) and issubclass(annotation, nn.Module) and annotation is not nn.Module
    return signature.replace(parameters=parameters[1:]), annotation if is_layer_class else None


def _schema(signature: inspect.Signature, name: str, mutates: tuple[str, ...]) -> str:
    """The op's schema without its layer: `"(Tensor x) -> Tensor"`."""

    def prototype() -> None: ...

    prototype.__signature__ = signature  # type: ignore[attr-defined]
    prototype.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    try:
        return torch.library.infer_schema(prototype, mutates_args=mutates)
    except ValueError as exc:
        raise UsageError(f"{name}: no schema can be inferred from the function's annotations: {exc}") from exc
