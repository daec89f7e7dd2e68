"""Attention in a few matrix products, for a GPU. Heads that share a key head are rows of one matrix, so that keys and
values are not repeated for each head, and all of the GPU reads them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ALIGNED = 8
"""Rows of scores begin at multiples of so many elements, else matrix products are slow."""


def sink_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scaling: float) -> Tensor:
    """Attend to keys and to each head's sink, in four kernels; a model's own function takes some 14.

    A sink is a logit of each head that takes part in the softmax and has no value ("Efficient Streaming Language Models
    with Attention Sinks", https://arxiv.org/abs/2309.17453; a learned one in gpt-oss). The products are written to
    scores that have room for it.

    Args:
        query: `[batch, heads, tokens, head_dim]`.
        key: `[batch, kv_heads, kv_tokens, head_dim]`; `kv_heads` divides `heads`.
        value: `[batch, kv_heads, kv_tokens, value_dim]`.
        mask: additive, `[batch, 1, tokens, kv_tokens]`, of the query's dtype.
        sinks: `[heads]`, of the query's dtype.
        scaling: factor of the products of queries and keys.

    Returns:
        `[batch, tokens, heads, value_dim]`, contiguous.
    """
    batch, heads, tokens, head_dim = query.shape
    kv_heads, kv_tokens = key.shape[1:3]
    groups, rows = batch * kv_heads, heads // kv_heads * tokens
    columns = [mask.expand(batch, heads, tokens, kv_tokens), sinks[:, None, None].expand(batch, heads, tokens, 1)]
    padding = -(kv_tokens + 1) % _ALIGNED
    if padding:
        columns.append(_unseen(sinks.dtype, sinks.device).expand(batch, heads, tokens, padding))
    scores = torch.cat(columns, -1)
    products = scores.view(groups, rows, -1)[..., :kv_tokens]
    keys = key.reshape(groups, kv_tokens, head_dim).transpose(1, 2)
    products.baddbmm_(query.reshape(groups, rows, head_dim), keys, alpha=scaling)
    shares = scores.softmax(-1).view(groups, rows, -1)[..., :kv_tokens]
    output = shares.bmm(value.reshape(groups, kv_tokens, value.shape[-1]))
    return output.view(batch, heads, tokens, -1).transpose(1, 2).contiguous()


@functools.cache
def _unseen(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The score of a token that nobody sees. It lives as long as the process, as CUDA graphs read it."""
    return torch.full((1, 1, 1, 1), -torch.inf, dtype=dtype, device=device)


def attention_in_products(packed: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of one token in matrix products, on a GPU.

    Args:
        packed: queries, `[batch, kv_heads, heads / kv_heads, head_dim]`, bfloat16 or float16.
        key: `[batch, kv_heads, kv_tokens, head_dim]`.
        value: `[batch, kv_heads, kv_tokens, value_dim]`.
        mask: additive, `[batch, 1, 1, kv_tokens]`, float32.
        scaling: factor of the products of queries and keys.

    Returns:
        `[batch, kv_heads, heads / kv_heads, value_dim]`. Scores are kept in float32, as fused kernels do.
    """
    batch, kv_heads, rows, head_dim = packed.shape
    groups, kv_tokens = batch * kv_heads, key.shape[2]
    masks = mask.expand(batch, kv_heads, rows, kv_tokens).reshape(groups, rows, kv_tokens)
    keys = key.reshape(groups, kv_tokens, head_dim).transpose(1, 2)
    queries = packed.reshape(groups, rows, head_dim)
    scores = torch.baddbmm(masks, queries, keys, alpha=scaling, out_dtype=torch.float32)
    output = scores.softmax(-1).to(value.dtype).bmm(value.reshape(groups, kv_tokens, -1))
    return output.view(batch, kv_heads, rows, -1)
