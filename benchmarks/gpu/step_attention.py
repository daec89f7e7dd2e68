"""How fast attention of one token is on a GPU: `python benchmarks/gpu/step_attention.py`.

One line for each number of sequences and of cached tokens: microseconds of a layer's own function and of
`step_attention`, for the heads of qwen3-30b-a3b and glm-4.7 (transformers' sdpa, with a mask) and of gpt-oss (the
model's own function, with sinks). Each time is that of a CUDA graph of several calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import timing
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from glowplug.frontends.hf.steps.attention import step_attention
from glowplug.layers import LayerRegistry
from glowplug.layers.context import ForwardContext, forward_context
from glowplug.ops.attention import ATTENTION_FN_ATTR

_CALLS = 12
"""Calls of one CUDA graph."""
MODELS = {"qwen3-30b-a3b": (32, 4, 128, False), "glm-4.7": (96, 8, 128, False), "gpt-oss-20b": (64, 8, 64, True)}
"""Name -> heads, key heads, their size, and whether they have sinks."""


def microseconds(run: Callable[[], Any]) -> float:
    """The median time of a call."""
    return timing.microseconds(lambda: (run() for _ in range(_CALLS)), _CALLS)


def measure(name: str, batch: int, kv_tokens: int) -> None:
    """Print a line."""
    heads, kv_heads, size, has_sinks = MODELS[name]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads // kv_heads, True
    if has_sinks:
        layer.sinks = nn.Parameter(random(heads), requires_grad=False)
    own: Callable[..., Any] = eager_attention_forward if has_sinks else sdpa_attention_forward
    object.__setattr__(layer, ATTENTION_FN_ATTR, own)
    layer.eval()
    query = random(batch, 1, heads, size).transpose(1, 2)
    key, value = random(batch, kv_heads, kv_tokens, size), random(batch, kv_heads, kv_tokens, size)
    seen = torch.arange(kv_tokens, device="cuda").expand(batch, 1, 1, -1) < kv_tokens - kv_tokens // 8
    lowest = torch.finfo(torch.bfloat16).min
    mask = torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill(~seen, lowest) if has_sinks else seen.contiguous()
    options = {"scaling": size**-0.5, "dropout": 0.0}

    def fast() -> Tensor:
        output = step_attention(layer, query, key, value, mask, options)
        assert output is not None
        return output

    expected = own(layer, query, key, value, mask, **options)[0].float()
    with torch.no_grad(), forward_context(ForwardContext(LayerRegistry({}))):
        wrong = float((fast().float() - expected).norm() / expected.norm()) > 0.02
        spent = microseconds(lambda: own(layer, query, key, value, mask, **options)), microseconds(fast)
    print(f"{name:14} {batch:4} {kv_tokens:7} {spent[0]:9.1f} {spent[1]:9.1f}{'  WRONG' if wrong else ''}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'':14} {'seqs':>4} {'tokens':>7} {'own us':>9} {'step us':>9}")
    for name, batch, kv_tokens in itertools.product(MODELS, (1, 16), (128, 512, 2048, 8192, 32768)):
        if batch * kv_tokens <= 1 << 17:
            measure(name, batch, kv_tokens)


if __name__ == "__main__":
    main()
