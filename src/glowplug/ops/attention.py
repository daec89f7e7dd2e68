"""`glowplug::attention` and `glowplug::kv_cache_update`: the ops at which a decoder's graph is cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from glowplug.layers.context import body_for, current_context
from glowplug.ops.arguments import decode
from glowplug.ops.layer_op import layer_op

ATTENTION_FN_ATTR = "_glowplug_attention_fn"
"""The attribute of a layer that holds the attention function for `glowplug::attention`."""


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    batch, heads, tokens, _head_dim = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


@layer_op("glowplug::attention", fake=_fake_attention, splitting=True)
def attention(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tensors: list[Tensor],
    options: str,
) -> Tensor:
    """Attention of one layer, by the function that the layer holds (sdpa, flash, a model's own).

    Args:
        layer: the attention module.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, kv_tokens, head_dim]`, as `kv_cache_update` returned it.
        value: `[batch, kv_heads, kv_tokens, value_dim]`.
        mask: boolean or additive, `[batch, 1, tokens, kv_tokens]`, or None for no mask.
        tensors: further tensor arguments of the attention function, such as attention sinks.
        options: its other keyword arguments; see `encode`.

    Returns:
        `[batch, tokens, heads, value_dim]`, contiguous, of the query's dtype.
    """
    inputs = (query, key, value, mask, *tensors)
    body = body_for(layer, inputs, options)
    if body is not None:
        return body(*inputs)
    kwargs, context = decode(options, tensors), current_context()
    attend = context.attend if context is not None else None
    output: Any = attend(layer, query, key, value, mask, kwargs) if attend is not None else None
    if output is None:
        output = getattr(layer, ATTENTION_FN_ATTR)(layer, query, key, value, mask, **kwargs)[0]
    return output if output.is_contiguous() else output.contiguous()


def layer_index(layer: nn.Module) -> int | None:
    """The index of a module's layer in the cache; None if it has none. Looks in `__dict__` first, as `getattr` is slow
    when it searches the weights."""
    for name in ("layer_idx", "layer_id"):
        own = name in layer.__dict__ or not hasattr(type(layer), name)
        index = layer.__dict__.get(name) if own else getattr(layer, name, None)
        if isinstance(index, int):
            return index
    return None


def _fake_update(key: Tensor, value: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, _tokens, _ = key.shape
    kv_tokens = extent.shape[0]
    return (
        key.new_empty(batch, heads, kv_tokens, key.shape[-1]),
        value.new_empty(batch, value.shape[1], kv_tokens, value.shape[-1]),
    )


@layer_op("glowplug::kv_cache_update", fake=_fake_update, splitting=True)
def kv_cache_update(layer: nn.Module, key: Tensor, value: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Write one step's keys and values into the layer's cache; return all keys and values that attention needs.

    The cache is the `ForwardContext`'s: any object with `update(key, value, layer_idx)`. Without a cache, keys and
    values are returned as they are.

    Args:
        layer: the attention module; `layer_index` gives its index in the cache.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        extent: `[kv_tokens]`, with any content: in a trace its length, a dynamic dim, is the number of cached tokens.
            Not read at run time.

    Returns:
        The keys and values of all cached tokens, `[batch, kv_heads, kv_tokens, ...]`, contiguous.
    """
    context = current_context()
    if context is None or context.cache is None:
        return key, value
    keys, values = context.cache.update(key, value, layer_index(layer))
    return keys, values
