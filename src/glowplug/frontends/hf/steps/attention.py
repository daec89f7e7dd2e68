"""Attention of one token for each sequence on a GPU, in fewer kernels than the layers' own functions take.

In a decode step attention reads much and computes little. Heads that share a key head become rows of one matrix, so
that keys and values need not be repeated, and a mask becomes an additive one once a step instead of once a layer. A
start compares the results with those of the layers' own functions. Checked on torch 2.11, and on transformers 5.17 and
5.23, the later of which packs heads itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from glowplug.layers.context import current_context
from glowplug.ops.attention import ATTENTION_FN_ATTR
from glowplug.ops.expert_linear import has_kernel
from glowplug.ops.grouped_attention import attention_in_products, sink_attention
from glowplug.ops.linears import HALF
from glowplug.reasons import said
from glowplug.verify.closeness import COMPILED, difference

_WITHOUT_EFFECT = frozenset(
    {"cache_position", "is_causal", "output_router_logits", "position_ids", "sliding_window", "use_cache"}
)
"""Options of attention functions that change nothing for one token and a given mask."""
_FEW_PROGRAMS, _FEW_TOKENS = 64, 128
"""Torch's fused kernels read all tokens of a key head in one program. With so few programs most of the GPU is idle, and
beyond so many tokens matrix products are faster: on an H100, for one sequence and 4 key heads 17 instead of 82 us over
4,096 tokens, and 78 instead of 628 over 32,768."""
_ALIGNED = 8
"""Rows of a mask begin at multiples of so many elements, as fused kernels need it."""


def step_attention(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Mapping[str, Any]
) -> Tensor | None:
    """Attention of one token, see `glowplug.ops.attention.attention`; None where a layer's own function has to run."""
    batch, heads, tokens, head_dim = query.shape
    kv_heads, kv_tokens = key.shape[1:3]
    scaling = options.get("scaling")
    if tokens != 1 or heads % kv_heads or not isinstance(scaling, float) or options.get("dropout"):
        return None
    if (mask is not None and mask.shape != (batch, 1, 1, kv_tokens)) or {key.dtype, value.dtype} != {query.dtype}:
        return None
    function, others = layer.__dict__.get(ATTENTION_FN_ATTR), options.keys() - {"scaling", "dropout"}
    if function is sdpa_attention_forward:
        if not others <= _WITHOUT_EFFECT or (mask is not None and mask.dtype not in (torch.bool, query.dtype)):
            return None
        packed = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
        output = _attend(packed, key, value, mask, scaling)
        return output.reshape(batch, 1, heads, -1)
    sinks = layer._parameters.get("sinks")
    if sinks is None or sinks.shape != (heads,) or mask is None or {sinks.dtype, mask.dtype} != {query.dtype}:
        return None
    return sink_attention(query, key, value, mask, sinks, scaling) if others <= {*_WITHOUT_EFFECT, "s_aux"} else None


def _attend(packed: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """What torch's `scaled_dot_product_attention` computes. Where it can, without cuDNN, torch's first choice with a
    mask: cuDNN takes up to two seconds for its first call, and builds a plan for each new shape, which a growing cache
    has in each step and layer."""
    aten: Any = torch.ops.aten
    output: Tensor
    bias: Tensor | None
    half = packed.dtype in HALF and has_kernel(packed.device)
    plain = half and all(size % 8 == 0 for size in (packed.shape[-1], value.shape[-1]))
    few = packed.shape[0] * packed.shape[1] < _FEW_PROGRAMS
    if mask is None and plain and packed.shape[-1] == value.shape[-1] <= 256:
        output = aten._scaled_dot_product_flash_attention.default(packed, key, value, scale=scaling)[0]
        return output
    if mask is not None and half and few and key.shape[2] > _FEW_TOKENS:
        # Finite, so that a sequence of nothing but padding gives numbers.
        bias = _additive(mask, torch.float32, torch.finfo(torch.float32).min)
        return attention_in_products(packed, key, value, bias, scaling)
    bias = _additive(mask, packed.dtype, -torch.inf) if mask is not None else None
    if bias is not None and plain and few:
        bias = bias.expand(*packed.shape[:3], -1)
        output = aten._scaled_dot_product_efficient_attention.default(packed, key, value, bias, False, scale=scaling)[0]
        return output
    return torch.nn.functional.scaled_dot_product_attention(packed, key, value, bias, scale=scaling)


def _additive(mask: Tensor, dtype: torch.dtype, lowest: float) -> Tensor:
    """A mask that is added to scores, `lowest` where nothing is seen, made once in a pass."""
    context = current_context()
    made = context.derived.get((id(mask), dtype)) if context is not None else None
    if made is None:
        tokens = mask.shape[-1]
        rows = torch.zeros((*mask.shape[:-1], tokens + -tokens % _ALIGNED), dtype=dtype, device=mask.device)
        made = mask, rows[..., :tokens]
        if mask.dtype is torch.bool:
            made[1].masked_fill_(~mask, lowest)
        else:
            made[1].copy_(mask).clamp_(min=lowest)
        if context is not None:
            context.derived[id(mask), dtype] = made
    return made[1]


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """In this context, torch's fused attention goes without cuDNN, which builds a plan for each new shape, in tenths of
    a second: a comparison has a dozen shapes that never come again."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class CheckedAttention:
    """Leaves attention to the layers' own functions, and compares `step_attention` of each call's last token with them.

    Attributes:
        problem: how they differed by more than rounding, in words; None if they never did.
    """

    def __init__(self) -> None:
        self.problem: str | None = None

    def __call__(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any
    ) -> None:
        if self.problem is None:
            last, last_mask = query[:, :, -1:], mask[..., -1:, :] if mask is not None else None
            try:
                self.problem = _difference(layer, last, key, value, last_mask, options)
            except Exception as exc:  # whatever it raises, the layers' own functions can run
                self.problem = f"it raised {said(exc)}"


def _difference(layer: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Any) -> str | None:
    output = step_attention(layer, query, key, value, mask, options)
    if output is None:
        return None
    own = getattr(layer, ATTENTION_FN_ATTR)(layer, query, key, value, mask, **options)[0]
    return difference(output, own, COMPILED, "its result")
