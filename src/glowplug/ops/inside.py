"""The compiled inside of a layer op: another way to compute what the layer's forward computes.

Which insides run is said by the `ForwardContext` of each pass: one that arrives later changes no pass under way.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from glowplug.layers.context import current_context


class Inside:
    """A compiled inside, bound to one layer.

    Args:
        layer: the layer.
        run: the compiled piece: takes the op's tensors, sizes and weights in `order`, returns a tuple of one tensor.
        order: for each input of `run` an expression over the op's tensors `a0`, `a1`, ..., or `"@"` and the path of a
            weight in the layer. Weights are looked up at each call, so that a replaced one is never missed.
        count: how many tensors the op has.
        tokens: serve up to so many tokens; None: any number.
    """

    __slots__ = ("__weakref__", "_owner", "run", "tokens")

    def __init__(
        self,
        layer: nn.Module,
        run: Callable[..., Sequence[Tensor]],
        order: Sequence[str],
        count: int,
        tokens: int | None,
    ) -> None:
        self._owner = weakref.ref(layer)
        self.tokens = tokens
        names: dict[str, Any] = {"piece": run}
        arguments = []
        for number, entry in enumerate(order):
            if entry.startswith("@"):
                names[f"table_{number}"], leaf = _table(layer, entry[1:])
                entry = f"table_{number}[{leaf!r}]"
            arguments.append(entry)
        parameters = ", ".join(f"a{number}" for number in range(count))
        self.run: Callable[..., Tensor] = eval(f"lambda {parameters}: piece({', '.join(arguments)})[0]", names)

    def serves(self, layer: nn.Module, hidden_states: Tensor) -> bool:
        """Whether a call of the layer with these tokens is to run compiled."""
        if self._owner() is not layer or not hidden_states.is_contiguous():
            return False
        return self.tokens is None or hidden_states.numel() <= self.tokens * hidden_states.shape[-1]


@dataclass(frozen=True)
class AttentionForm:
    """How attention of one layer is called. Batch, tokens and cached tokens may be any number.

    Attributes:
        options: its keyword arguments that are no tensors; see `encode`.
        heads, kv_heads: heads of the query, and of keys and values.
        head_dim, value_dim: sizes of a head of the query, and of the values.
        dtype: of all but the mask.
        mask: dtype of the mask, `[batch, 1, tokens, kv_tokens]`.
        extra: shapes of further tensors, which are weights; None for one that gives positions, and is not read.
        strided: whether the query lies in memory as `[batch, tokens, heads, head_dim]`.
    """

    options: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    mask: torch.dtype
    extra: tuple[tuple[int, ...] | None, ...]
    strided: bool = False

    def with_strides(self, strided: bool) -> AttentionForm:
        """The same, its query lying so."""
        return replace(self, strided=strided)

    def fits(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether a call has these sizes and dtypes, and all but the query is contiguous."""
        batch, heads, tokens, head_dim = query.shape
        kv_tokens = key.shape[2]
        return (
            mask is not None
            and mask.shape == (batch, 1, tokens, kv_tokens)
            and key.shape == (batch, self.kv_heads, kv_tokens, head_dim)
            and value.shape == (batch, self.kv_heads, kv_tokens, self.value_dim)
            and heads == self.heads
            and head_dim == self.head_dim
            and query.dtype is self.dtype
            and mask.dtype is self.mask
            and key.is_contiguous()
            and value.is_contiguous()
            and mask.is_contiguous()
        )

    def make(
        self, batch: int, tokens: int, kv_tokens: int, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Query, keys, values, a causal mask and further tensors: random ones, or zeros without a generator."""

        def tensor(*sizes: int) -> Tensor:
            made = torch.zeros(sizes) if generator is None else torch.rand(sizes, generator=generator) * 2 - 1
            return made.to(device, self.dtype)

        if self.strided:
            query = tensor(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        else:
            query = tensor(batch, self.heads, tokens, self.head_dim)
        key = tensor(batch, self.kv_heads, kv_tokens, self.head_dim)
        value = tensor(batch, self.kv_heads, kv_tokens, self.value_dim)
        seen = torch.ones(batch, 1, tokens, kv_tokens, dtype=torch.bool).tril(kv_tokens - tokens)
        if self.mask is not torch.bool:
            seen = torch.zeros(seen.shape, dtype=self.mask).masked_fill(~seen, torch.finfo(self.mask).min)
        positions = torch.arange(kv_tokens - tokens, kv_tokens, device=device).expand(batch, tokens)
        extra = (positions if sizes is None else tensor(*sizes) for sizes in self.extra)
        return query, key, value, seen.to(device), *extra


class AttentionInside(Inside):
    """The inside of `glowplug::attention`.

    Args:
        layer, run, order, tokens: see `Inside`; the op's tensors are query, keys, values, mask and further ones.
        form: of the calls that it serves.
    """

    __slots__ = ("form",)

    def __init__(
        self,
        layer: nn.Module,
        run: Callable[..., Sequence[Tensor]],
        order: Sequence[str],
        form: AttentionForm,
        tokens: int | None,
    ) -> None:
        super().__init__(layer, run, order, 4 + len(form.extra), tokens)
        self.form = form

    def attends(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: str
    ) -> bool:
        """Whether a call of the layer is to run compiled."""
        form = self.form
        return (
            self._owner() is layer
            and options == form.options
            and (self.tokens is None or query.shape[0] * query.shape[2] <= self.tokens)
            and (query.transpose(1, 2) if form.strided else query).is_contiguous()
            and form.fits(query, key, value, mask)
        )


def inside_of(layer: nn.Module) -> Any:
    """The `Inside` that a layer's op runs in this pass; None: the layer's own forward."""
    context = current_context()
    return context.insides.get(id(layer)) if context is not None else None


def _table(layer: nn.Module, path: str) -> tuple[Mapping[str, Any], str]:
    """The table of a module that holds a weight, and its name there."""
    parent, _, leaf = path.rpartition(".")
    module = layer.get_submodule(parent)
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
    return next(table for table in tables if leaf in table), leaf
