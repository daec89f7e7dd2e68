"""Attention that is several kernels in eager mode (a model's own function, with sinks or a bias), so that compiling it
pays. How a layer's attention is called is observed while its program is compared with eager.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glowplug.errors import CaptureError
from glowplug.graph.capture import Captured
from glowplug.graph.shapes import read_assumptions
from glowplug.hf.interfaces import attention_layers
from glowplug.hf.kinds import Kind, Made, by_kind
from glowplug.ops.arguments import encode, parse
from glowplug.ops.attention import ATTENTION_FN_ATTR
from glowplug.ops.inside import AttentionForm, AttentionInside, Inside

_OP = "glowplug::attention"
_CACHED = 128
"""Keys that a trial attends to, at least."""
_FURTHER = 3
"""Tensors that a compiled attention may get besides query, keys, values and mask."""
_SIZES = ((1, 1, 1), (1, 1, 6), (2, 1, 9), (1, 5, 5), (3, 2, 7), (2, 12, 12))
"""Sequences, tokens and cached tokens for which an inside must be right, whatever its trial goes on to time."""
_CPU = torch.device("cpu")
Forms = dict[str, AttentionForm]
"""Name of an attention layer -> how it is called."""


class Observed:
    """Stands in for a layer's attention function, and notes how it is called. It can't be told when that varies.

    Args:
        function: the function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.forms: set[AttentionForm | None] = set()
        self.strided = False

    def __call__(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """Attention of one layer."""
        self.forms.add(_form(query, key, value, mask, kwargs))
        self.strided |= not query.is_contiguous()
        return self.function(layer, query, key, value, mask, **kwargs)

    @property
    def form(self) -> AttentionForm | None:
        """How the layer was called each time; None when it was never called, or in several ways."""
        (form,) = self.forms if len(self.forms) == 1 else (None,)
        return form.with_strides(self.strided) if form is not None else None


def _form(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]) -> Any:
    if mask is None:
        return None
    try:
        tensors, options = encode(kwargs)
    except CaptureError:
        return None
    positions = [tensor.dtype is torch.int64 and tensor.dim() == 2 for tensor in tensors]
    form = AttentionForm(
        options,
        query.shape[1],
        key.shape[1],
        query.shape[3],
        value.shape[3],
        query.dtype,
        mask.dtype,
        tuple(None if unread else tuple(t.shape) for t, unread in zip(tensors, positions, strict=True)),
    )
    weights = [tensor for tensor, unread in zip(tensors, positions, strict=True) if not unread]
    plain = all(tensor.dtype is query.dtype for tensor in (key, value, *weights))
    return form if plain and form.fits(query, key, value, mask) else None


@contextmanager
def observed(model: nn.Module, forms: Forms) -> Iterator[None]:
    """Note how the model's own attention functions are called, by layer; of those that transformers brings, which are
    one kernel each, none."""
    watched: dict[str, tuple[nn.Module, Observed]] = {}
    for name, layer in attention_layers(model).items():
        function = layer.__dict__.get(ATTENTION_FN_ATTR)
        if function is not None and function not in ALL_ATTENTION_FUNCTIONS.values():
            watched[name] = layer, Observed(function)
    for layer, stand_in in watched.values():
        object.__setattr__(layer, ATTENTION_FN_ATTR, stand_in)
    try:
        yield
    finally:
        for name, (layer, stand_in) in watched.items():
            object.__setattr__(layer, ATTENTION_FN_ATTR, stand_in.function)
            form = stand_in.form
            if form is not None:
                forms[name] = form


@dataclass(frozen=True)
class AttentionKind(Kind):
    """Attention layers of a kind that are called in the same way.

    Attributes:
        form: how.
    """

    form: AttentionForm

    @property
    def attend(self) -> Callable[..., Any]:
        """Their attention function."""
        found: Callable[..., Any] = self.layers[0].__dict__[ATTENTION_FN_ATTR]
        return found

    @property
    def facts(self) -> str:
        """See `Kind.facts`."""
        return f"{self.attend.__module__}.{self.attend.__qualname__} {self.form!r}"

    @property
    def files(self) -> Sequence[str]:
        """See `Kind.files`."""
        return (inspect.getsourcefile(inspect.unwrap(self.attend)) or "",)

    def function(self) -> Callable[..., Tensor]:
        """See `Kind.function`."""
        attend = self.attend
        constants, named = parse(self.form.options)
        fixed, places = dict(constants), {place: name for name, place in named}
        names = [places[number] for number in range(len(places))]

        def own(
            layer: Any, a0: Tensor, a1: Tensor, a2: Tensor, a3: Tensor, a4: Any = None, a5: Any = None, a6: Any = None
        ) -> Tensor:
            further = dict(zip(names, (a4, a5, a6), strict=False))
            found: Tensor = attend(layer, a0, a1, a2, a3, **fixed, **further)[0]
            return found.contiguous()

        return own

    def examples(self, device: torch.device) -> tuple[Tensor, ...]:
        """See `Kind.examples`."""
        tensors = self.form.make(2, 8, 11, device)
        varying = [(0, 2), (0, 2), (0, 2), (0, 2, 3), *((0, 1) if sizes is None else () for sizes in self.form.extra)]
        for tensor, dims in zip(tensors, varying, strict=True):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        return tensors

    def trial(self, tokens: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...] | None:
        """See `Kind.trial`."""
        return self.form.make(1, tokens, max(tokens, _CACHED), device, generator)

    def more_trials(self, generator: torch.Generator, device: torch.device) -> list[tuple[Tensor, ...]]:
        """See `Kind.more_trials`."""
        return [self.form.make(*sizes, device, generator) for sizes in _SIZES]

    def check(self, captured: Captured) -> None:
        """See `Kind.check`. Positions must not be read, as nobody knows what an attention function wants of them."""
        unread = {f"L['a{4 + number}']" for number, sizes in enumerate(self.form.extra) if sizes is None}
        if any(entry.source in unread for entry in captured.inputs):
            raise CaptureError("the attention function computes with positions")
        assumptions = read_assumptions(captured, {entry.source for entry in captured.inputs})
        for sizes in _SIZES:
            shapes = {f"L['a{number}']": tuple(t.shape) for number, t in enumerate(self.form.make(*sizes, _CPU))}
            broken = assumptions.broken_by(shapes)
            if broken is not None:
                raise CaptureError(f"attention is called with sizes that its trace excludes: {broken}")

    def bind(self, made: Made, layer: nn.Module, tokens: int | None) -> Inside:
        """See `Kind.bind`."""
        return AttentionInside(layer, made.run, made.order, self.form, tokens)


def attention_kinds(model: nn.Module, forms: Mapping[str, AttentionForm]) -> list[Kind]:
    """The kinds of attention whose inside is worth compiling."""
    layers = attention_layers(model)
    groups: dict[tuple[AttentionForm, Any], dict[str, nn.Module]] = {}
    for name, form in forms.items():
        _, named = parse(form.options)
        if len(named) <= _FURTHER and all(isinstance(place, int) for _, place in named):
            groups.setdefault((form, layers[name].__dict__.get(ATTENTION_FN_ATTR)), {})[name] = layers[name]
    return [
        AttentionKind(_OP, *kind, form)
        for (form, function), named in groups.items()
        if function is not None
        for kind in by_kind(named)
    ]
