"""glowplug's entries in transformers' attention and experts interfaces, and the switch that puts them in force in what
is to be captured. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glowplug.errors import CaptureError
from glowplug.graph.capture import in_mode_of, is_fake
from glowplug.hf.caches import own_cache_class
from glowplug.hf.mixer_entry import mixer_entry
from glowplug.hf.rotary_entry import rotary_entry, rotary_layers
from glowplug.hf.shadow import Shadow
from glowplug.hf.sharding import entry_of, sharded_modules
from glowplug.layers.reads import FORWARD_HOOKS, hooks_of
from glowplug.ops.arguments import encode
from glowplug.ops.attention import ATTENTION_FN_ATTR, attention, kv_cache_update, layer_index
from glowplug.ops.moe import moe_forward, moe_forward_shared, shared_experts_name

NAME = "glowplug"
_CACHE_ARGUMENTS = {"cache_params", "past_key_values", "past_key_value", "layer_past"}


def _attention_entry(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that traces see: hands everything to `glowplug::attention`."""
    tensors, options = encode(kwargs)
    return attention(module, query, key, value, attention_mask, tensors, options), None


def _experts_entry(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function that traces see when experts are opaque."""
    return moe_forward(module, hidden_states, top_k_index, top_k_weights)


AttentionInterface.register(NAME, _attention_entry)
AttentionMaskInterface.register(NAME, sdpa_mask)
ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_entry)


class CaptureCache(Cache):
    """The cache that a trace sees: updates become `glowplug::kv_cache_update`, lengths become symbolic sizes. Any
    other question can't be answered without running the model, and makes the model fall back.

    Args:
        layers: layer index -> attention module.
        extent: `[kv_tokens]`, its dim dynamic: stands for the length of what an update returns.
        past: `[past_tokens]`, its dim dynamic: stands for the length of the cache before the step.
        padding: the mask that the model makes all others of inside the trace, `[batch, kv_tokens]`; None where they are
            made outside.
    """

    def __init__(
        self, layers: dict[int, nn.Module], extent: Tensor, past: Tensor, padding: Tensor | None = None
    ) -> None:
        self.layers: Any = _NoLayers()
        self.attention_layers = layers
        self.extent = extent
        self.past = past
        self.padding = padding

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Trace the update of one layer."""
        if layer_idx not in self.attention_layers:
            raise CaptureError("a layer that glowplug does not know for attention writes to the cache")
        return kv_cache_update(self.attention_layers[layer_idx], key_states, value_states, self.extent)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The symbolic length of the cache before the step."""
        return self.past.shape[0]

    def get_mask_sizes(self, *_: Any, **__: Any) -> Any:
        """The symbolic length of what each layer attends to, where masks are not made outside the program."""
        if self.padding is None:
            raise CaptureError("the model asks the cache for mask sizes inside its forward")
        return self.padding.shape[1], 0


def capture_cache(
    model: nn.Module, layers: dict[int, nn.Module], extent: Tensor, past: Tensor, padding: Tensor | None = None
) -> CaptureCache:
    """A `CaptureCache` for a model; of the model's own class of caches as well, if it has one and asks for it."""
    own = own_cache_class(model)
    made = CaptureCache if own is None else _capturing(own)  # type: ignore[arg-type]
    return made(layers, extent, past, padding)


@functools.lru_cache(maxsize=16)
def _capturing(own: type[Cache]) -> type[CaptureCache]:
    return type(f"Capture{own.__name__}", (CaptureCache, own), {})


class _NoLayers:
    """The layers of the cache that a trace sees: none to go over, and none to read or write."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: Any) -> Any:
        raise CaptureError("the model computes with what lies in its cache, outside of the layers' own attention")


def attention_function(layer: nn.Module, implementation: str | None) -> Callable[..., Any] | None:
    """The function that `layer` runs under an attention implementation; None when it can't be told."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    forward = inspect.unwrap(type(layer).forward)
    return getattr(forward, "__globals__", {}).get("eager_attention_forward")


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's attention modules that own a layer of the cache, by name."""
    return _attention_of(_indexed(model))


def _indexed(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules that know which layer they are, by name."""
    return {name: module for name, module in model.named_modules() if layer_index(module) is not None}


def _attention_of(indexed: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in indexed.items() if hasattr(module, "is_causal")}


def mixer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that mix tokens by states of their own in the cache, other than by keys and values, by name."""
    return _mixers_of(_indexed(model))


def _mixers_of(with_index: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    outer = {parent for name in with_index for parent in _parents(name)}
    return {
        name: module
        for name, module in with_index.items()
        if name not in outer
        and not hasattr(module, "is_causal")
        and _CACHE_ARGUMENTS & set(inspect.signature(type(module).forward).parameters)
    }


def _parents(name: str) -> Iterator[str]:
    """Names of the modules that a module lies in."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def token_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers and other mixers, by name, in the model's order."""
    indexed = _indexed(model)
    found = _attention_of(indexed).keys() | _mixers_of(indexed).keys()
    return {name: module for name, module in indexed.items() if name in found}


def experts_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward goes through transformers' experts interface, by name."""
    return {name: module for name, module in model.named_modules() if _asks_the_interface(type(module))}


def _asks_the_interface(cls: type[nn.Module]) -> bool:
    """Whether the class's forward is the one that transformers' experts decorator puts around it."""
    module = getattr(cls.forward, "__globals__", {}).get("__name__")
    return bool(module == ALL_EXPERTS_FUNCTIONS.__class__.__module__)


def routed_experts_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Experts that take tokens routed already, past transformers' experts interface (Llama 4's), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        and not _asks_the_interface(type(module))
        and _has_stacked_weights(module)
        and len(inspect.signature(type(module).forward).parameters) == 2
    }


def shared_blocks(model: nn.Module, hidden_size: int, experts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Blocks of routed and shared experts that map one tensor to one tensor of its shape, by name.

    Args:
        model: the model.
        hidden_size: width of its hidden states.
        experts: its experts that go through transformers' interface.
    """
    routed = {id(module) for module in experts.values()}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if id(module._modules.get("experts")) in routed and shared_experts_name(module) is not None
    }
    return mapping_to_themselves(model, candidates, hidden_size)


def mapping_to_themselves(model: nn.Module, modules: dict[str, nn.Module], hidden_size: int) -> dict[str, nn.Module]:
    """Those of a model's modules that map hidden states to a tensor of their shape, by name. Each class is asked once,
    with two zero tokens; with experts that need no memory if the model has none. Modules with a forward of their own
    are not asked."""
    verdicts: dict[type, bool] = {}
    modules = {name: module for name, module in modules.items() if "forward" not in module.__dict__}
    for module in modules.values():
        cls = type(module)
        if cls not in verdicts:
            parameter = next(module.parameters())
            try:
                asked = module
                if is_fake(parameter):
                    shadow = Shadow(module)
                    shadow.put_in_force(experts="batched_mm")
                    asked = shadow.root
                with torch.no_grad(), in_mode_of(parameter):
                    probe = torch.zeros(1, 2, hidden_size, dtype=parameter.dtype, device=parameter.device)
                    output = cls.forward(asked, probe)
                verdicts[cls] = isinstance(output, Tensor) and output.shape == probe.shape
            except (TypeError, RuntimeError, ValueError, NotImplementedError):
                verdicts[cls] = False
    return {name: module for name, module in modules.items() if verdicts[type(module)]}


def untraceable_blocks(model: nn.Module, hidden_size: int, served: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Blocks whose experts go past transformers' interfaces and ask, in Python, how many tokens each expert gets, which
    no trace can answer; by name. Of blocks inside each other, the inner ones.

    Args:
        model: the model.
        hidden_size: width of its hidden states.
        served: its experts that keep to an interface, and its token mixers: no such block is in or around them.
    """
    within = {id(part) for module in served.values() for part in module.modules()}
    if not any(_has_stacked_weights(module) for module in model.modules() if id(module) not in within):
        return {}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in within
        and len(inspect.signature(type(module).forward).parameters) == 2
        and not any(id(part) in within for part in module.modules())
        and any(parameter.dim() == 3 for parameter in module.parameters())
        and any(_asks_for_counts(type(part)) for part in module.modules())  # type: ignore[arg-type]
    }
    outer = {parent for name in candidates for parent in _parents(name)}
    inner = {name: module for name, module in candidates.items() if name not in outer}
    return mapping_to_themselves(model, inner, hidden_size)


def _has_stacked_weights(module: nn.Module) -> bool:
    """Whether a module itself has a weight of several matrices, as experts have."""
    return any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None)


_COUNTING = {"tolist", "item", "nonzero"}


@functools.lru_cache(maxsize=1024)
def _asks_for_counts(cls: type[nn.Module]) -> bool:
    """Whether a method of a model's class takes a tensor's values into Python."""
    return any(
        _COUNTING & set(code.co_names)
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if (code := getattr(inspect.unwrap(function), "__code__", None)) is not None
    )


def give_attention_functions(model: PreTrainedModel) -> None:
    """Let each attention layer keep the function that `glowplug::attention` runs for it.

    Raises:
        CaptureError: one's function can't be told.
    """
    for name, layer in attention_layers(model).items():
        config = getattr(layer, "config", model.config)
        function = attention_function(layer, config._attn_implementation_internal)
        if function is None:
            raise CaptureError(f"{name} runs an attention function that glowplug can't find")
        object.__setattr__(layer, ATTENTION_FN_ATTR, function)


def put_in_force(
    shadow: Shadow,
    *,
    experts: str | None,
    blocks: Mapping[str, nn.Module],
    routed: Mapping[str, nn.Module],
    whole: bool = False,
) -> None:
    """Route attention, and experts, of what is to be captured through glowplug's ops.

    Args:
        shadow: of the model that is to be captured.
        experts: the experts implementation for the capture; None leaves the model's own.
        blocks: the model's blocks to run whole, behind `glowplug::moe_forward_shared`.
        routed: its experts of routed tokens to run behind `glowplug::moe_forward`.
        whole: run attention modules whole, behind `glowplug::mixer`: for a model that computes with its masks or its
            cache inside them.

    Raises:
        CaptureError: a module that is distributed over processes can't be traced.
    """
    model, blocks, routed = shadow.root, shadow.of(blocks), shadow.of(routed)
    mixers = token_mixers(model) if whole else mixer_layers(model)
    entries = _sharded_entries(model, mixers, {**blocks, **routed, **mixers})
    shadow.put_in_force(attention=None if whole else NAME, experts=experts)
    for module, entry in entries:
        _set_forward(module, entry)
    for block in blocks.values():
        _set_forward(block, _block_entry)
    for layer in routed.values():
        _set_forward(layer, _routed_entry)
    opaque = [*blocks.values(), *routed.values(), *(experts_layers(model).values() if experts == NAME else ())]
    for layer in opaque:  # the op calls the layer, and so its hooks
        layer.__dict__.update({table: {} for table in FORWARD_HOOKS})
    for layer in mixers.values():
        _set_forward(layer, mixer_entry(type(layer)))  # type: ignore[arg-type]
    for layer in rotary_layers(model).values():
        _set_forward(layer, rotary_entry(layer))


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of the layer runs hooks."""
    return bool(hooks_of(layer))


def _set_forward(module: nn.Module, function: Callable[..., Any] | None) -> None:
    """Give a module a forward of its own; None: that of its class."""
    module.__dict__.pop("forward", None)
    if function is not None:
        object.__setattr__(module, "forward", types.MethodType(function, module))


def _sharded_entries(
    model: nn.Module, mixers: dict[str, nn.Module], replaced: dict[str, nn.Module]
) -> list[tuple[nn.Module, Callable[..., Any] | None]]:
    """The modules that are distributed over processes, with what traces see in the place of their forward.

    Raises:
        CaptureError: one can't be traced.
    """
    distributed = sharded_modules(model)
    for name in attention_layers(model):
        if name in distributed and name not in mixers:
            raise CaptureError(f"the attention of {name} is distributed as a whole")
    return [(module, entry_of(name, module)) for name, module in distributed.items() if name not in replaced]


def _routed_entry(layer: nn.Module, hidden_states: Tensor) -> Tensor:
    return moe_forward(layer, hidden_states, None, None)


def _block_entry(block: nn.Module, hidden_states: Tensor) -> Tensor:
    return moe_forward_shared(block, hidden_states)


@functools.lru_cache(maxsize=256)
def forward_parameters(cls: type) -> tuple[str, ...]:
    """Names of the parameters of a model class's forward, in order, without self."""
    names = list(inspect.signature(cls.forward).parameters)  # type: ignore[attr-defined]
    return tuple(name for name in names[1:] if name not in ("kwargs", "args"))
