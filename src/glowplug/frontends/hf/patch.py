"""Registers glowplug with transformers' attention and experts interfaces, and routes the copy of a model that is traced
through glowplug's ops. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import sdpa_mask

from glowplug.errors import CaptureError
from glowplug.frontends.hf.caches import own_cache_class
from glowplug.frontends.hf.discover import (
    BY_EXPERT,
    NAME,
    ExpertsPlan,
    Shadow,
    attention_layers,
    experts_layers,
    mixer_layers,
    token_mixers,
)
from glowplug.frontends.hf.entries import mixer_entry, rotary_entry, rotary_layers
from glowplug.frontends.hf.sharding import entry_of, sharded_modules
from glowplug.layers.reads import FORWARD_HOOKS
from glowplug.ops.arguments import encode
from glowplug.ops.attention import attention, kv_cache_update
from glowplug.ops.expert_linear import expert_linear
from glowplug.ops.moe import moe_forward, moe_forward_shared


def _attention_entry(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that traces see."""
    tensors, options = encode(kwargs)
    return attention(module, query, key, value, attention_mask, tensors, options), None


def _experts_entry(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function that traces see if experts are opaque."""
    return moe_forward(module, hidden_states, top_k_index, top_k_weights)


def _by_expert(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function that traces see if experts stay in the graph and `glowplug::expert_linear` has a kernel.
    Computes what transformers' `batched_mm_experts_forward` does."""
    tokens, top_k = top_k_index.shape
    experts = top_k_index.reshape(-1)
    transposed = module.is_transposed
    name = "gate_up_proj" if module.has_gate else "up_proj"
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    inner = expert_linear(hidden_states, getattr(module, name), experts, bias, top_k, transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    bias = module.down_proj_bias if module.has_bias else None
    output = expert_linear(inner, module.down_proj, experts, bias, 1, transposed)
    if getattr(module, "has_post_expert_norm", False):  # not in transformers 5.17
        output = module.post_expert_norm(output)
    weighted = output * top_k_weights.reshape(-1, 1)
    return weighted.view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


AttentionInterface.register(NAME, _attention_entry)
AttentionMaskInterface.register(NAME, sdpa_mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_entry)
ALL_EXPERTS_FUNCTIONS.register(BY_EXPERT, _by_expert)


class CaptureCache(Cache):
    """The cache that a trace sees: updates become `glowplug::kv_cache_update`, lengths become symbolic sizes. Nothing
    else is known without running the model, so any other access makes the capture fail.

    Args:
        layers: layer index -> attention module.
        extent: `[kv_tokens]`, dynamic; its size is the length of what an update returns.
        past: `[past_tokens]`, dynamic; its size is the length of the cache before the step.
        padding: the mask of which the model makes all others inside the trace, `[batch, kv_tokens]`; None if they are
            made outside.
    """

    def __init__(self, layers: dict[int, nn.Module], extent: Tensor, past: Tensor, padding: Tensor | None) -> None:
        self.layers: Any = _NoLayers()
        self.attention_layers = layers
        self.extent = extent
        self.past = past
        self.padding = padding

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Trace the update of a layer."""
        if layer_idx not in self.attention_layers:
            raise CaptureError("a layer that glowplug does not know for attention writes to the cache")
        return kv_cache_update(self.attention_layers[layer_idx], key_states, value_states, self.extent)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The symbolic length of the cache before the step."""
        return self.past.shape[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> Any:
        """The symbolic length of what each layer attends to, if the model makes its masks inside the trace."""
        if self.padding is None:
            raise CaptureError("the model asks the cache for mask sizes inside its forward")
        return self.padding.shape[1], 0


def capture_cache_class(model: nn.Module) -> type[CaptureCache]:
    """The `CaptureCache` for a model; also a subclass of the cache class that the model defines, if any."""
    own = own_cache_class(model)
    return CaptureCache if own is None else _capture_subclass(own)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=16)
def _capture_subclass(own: type[Cache]) -> type[CaptureCache]:
    return type(f"Capture{own.__name__}", (CaptureCache, own), {})


class _NoLayers:
    """The layers of a `CaptureCache`: there is none to iterate over, and none to read or write."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        raise CaptureError("the model computes with what lies in its cache, outside of the layers' own attention")


def put_in_force(shadow: Shadow, plan: ExpertsPlan, *, whole: bool = False) -> None:
    """Route attention, mixers, experts and distributed modules of the model to be traced through glowplug's ops.

    Args:
        shadow: a copy of the model.
        plan: how the trace treats its experts.
        whole: run attention modules as a whole, behind `glowplug::mixer`: for a model that computes with its masks or
            its cache inside them.

    Raises:
        CaptureError: a module that is distributed over processes can't be traced.
    """
    model, blocks, routed = shadow.root, shadow.of(plan.blocks), shadow.of(plan.routed)
    mixers = token_mixers(model) if whole else mixer_layers(model)
    entries = _sharded_entries(model, mixers, {**blocks, **routed, **mixers})
    shadow.put_in_force(attention=None if whole else NAME, experts=plan.implementation)
    for module, entry in entries:
        _set_forward(module, entry)
    for block in blocks.values():
        _set_forward(block, _block_entry)
    for layer in routed.values():
        _set_forward(layer, _routed_entry)
    opaque_experts = experts_layers(model).values() if plan.implementation == NAME else ()
    for layer in (*blocks.values(), *routed.values(), *opaque_experts):  # the op calls the layer and so its hooks
        layer.__dict__.update({table: {} for table in FORWARD_HOOKS})
    for layer in mixers.values():
        _set_forward(layer, mixer_entry(type(layer)))  # type: ignore[arg-type]
    for layer in rotary_layers(model).values():
        _set_forward(layer, rotary_entry(layer))


def _set_forward(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Replace a module's forward; None restores that of its class."""
    module.__dict__.pop("forward", None)
    if function is not None:
        object.__setattr__(module, "forward", types.MethodType(function, module))


def _sharded_entries(
    model: nn.Module, mixers: dict[str, nn.Module], replaced: dict[str, nn.Module]
) -> list[tuple[nn.Module, Callable[..., Any] | None]]:
    """The distributed modules, except those in `replaced`, and the forward that traces see in each; see `entry_of`."""
    distributed = sharded_modules(model)
    for name in attention_layers(model):
        if name in distributed and name not in mixers:
            raise CaptureError(f"the attention of {name} is distributed as a whole")
    return [(module, entry_of(name, module)) for name, module in distributed.items() if name not in replaced]


def _routed_entry(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    return moe_forward(layer, hidden_states, None, None)


def _block_entry(block: nn.Module, hidden_states: Tensor) -> Tensor:
    return moe_forward_shared(block, hidden_states)
