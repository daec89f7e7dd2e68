"""Attention with sinks for a GPU, in four kernels of torch.

A sink is a logit of each head that takes part in the softmax and has no value ("Efficient Streaming Language Models
with Attention Sinks", https://arxiv.org/abs/2309.17453; a learned one in gpt-oss). A model's own function repeats keys
and values for each head that shares them, and takes some 14 kernels. Here heads that share a key head are rows of one
matrix, and the products are written to scores that have room for the sink.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_ALIGNED = 8
"""Rows of scores begin at multiples of so many elements, else matrix products are slow."""


def sink_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor, scaling: float) -> Tensor:
    """Attend to keys and to each head's sink.

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
