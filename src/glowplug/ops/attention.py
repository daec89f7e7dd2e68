"""`glowplug::attention` and `glowplug::kv_cache_update`: the ops at which a decoder's graph is cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from glowplug.layers.context import body_for, current_context
from glowplug.ops.arguments import decode
from glowplug.ops.layer_op import layer_op

ATTENTION_FN_ATTR = "_glowplug_attention_fn"
"""Where a layer keeps the attention function that `glowplug::attention` runs for it."""


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
    """Attention of one layer, by whatever function the layer keeps (sdpa, flash, a model's own).

    Args:
        layer: the attention module.
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, kv_tokens, head_dim]`, as `kv_cache_update` returned it.
        value: `[batch, kv_heads, kv_tokens, value_dim]`.
        mask: boolean or additive, `[batch, 1, tokens, kv_tokens]`, or None for what the function does without one.
        tensors: further tensor arguments of the attention function, such as attention sinks.
        options: its other keyword arguments; see `encode`.

    Returns:
        `[batch, tokens, heads, value_dim]`, contiguous, of the query's dtype.
    """
    given = (query, key, value, mask, *tensors)
    body = body_for(layer, given, options)
    if body is not None:
        return body(*given)
    kwargs = decode(options, tensors)
    output = getattr(layer, ATTENTION_FN_ATTR)(layer, query, key, value, mask, **kwargs)[0]
    return output if output.is_contiguous() else output.contiguous()


def layer_index(layer: nn.Module) -> int | None:
    """Which layer of the cache is a module's; None when it has none. The attribute is not looked for among the weights,
    which is what takes `getattr` long."""
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
    """Write one step's keys and values into the layer's cache; give back all that attention is to see.

    The cache is the `ForwardContext`'s: any object with `update(key, value, layer_idx)`. Without one, keys and values
    pass through.

    Args:
        layer: the attention module; `layer_index` says which layer of the cache is meant.
        key: `[batch, kv_heads, tokens, head_dim]`.
        value: `[batch, kv_heads, tokens, value_dim]`.
        extent: `[kv_tokens]`, any content: in a trace its length, a dynamic dim, stands for the number of cached
            tokens. Not read at run time.

    Returns:
        Keys and values of all cached tokens, `[batch, kv_heads, kv_tokens, ...]`, contiguous.
    """
    context = current_context()
    if context is None or context.cache is None:
        return key, value
    keys, values = context.cache.update(key, value, layer_index(layer))
    return keys, values
