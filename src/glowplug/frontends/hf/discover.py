"""Which modules of a transformers model are what: attention, other mixers, experts, the layer stack; and what happens
to its experts in a trace: left in the graph, or hidden behind a layer op. Checked on transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from glowplug.errors import CaptureError
from glowplug.frontends.hf.entries import rope_types, rotary_layers
from glowplug.frontends.hf.sharding import sharded_modules
from glowplug.graph.capture import in_mode_of, is_fake
from glowplug.layers.copies import TreeCopy
from glowplug.layers.stack import LayerStack, find_stack
from glowplug.ops.attention import ATTENTION_FN_ATTR, layer_index
from glowplug.ops.moe import shared_experts_name

NAME = "glowplug"
"""glowplug's entry in transformers' interfaces."""
_CACHE_ARGUMENTS = {"cache_params", "past_key_values", "past_key_value", "layer_past"}
_COUNTING = {"tolist", "item", "nonzero"}


class Shadow(TreeCopy):
    """The copy of a tree of modules, see `TreeCopy`."""

    def __init__(self, root: nn.Module, into: Callable[[nn.Module], bool] | None = None) -> None:
        super().__init__(root, into, (PreTrainedConfig,))

    def put_in_force(self, *, attention: str | None = None, experts: str | None = None) -> None:
        """Let the copy compute with other implementations of attention or experts."""
        for config in self.configs:
            if attention is not None and hasattr(config, "_attn_implementation_internal"):
                config._attn_implementation_internal = attention
            if experts is not None:
                config._experts_implementation_internal = experts


_TRACEABLE = ("grouped_mm", "batched_mm")


@dataclass(frozen=True)
class ExpertsPlan:
    """How one model's experts are captured.

    Attributes:
        kind: `"inline"`, `"opaque"`, or `"none"` when the model has none that glowplug recognises.
        implementation: the experts implementation for the capture; None leaves the model's own.
        routed: experts that take routed tokens, which run behind `glowplug::moe_forward`.
        blocks: blocks that run whole, behind `glowplug::moe_forward_shared`.
        layers: every layer that an op of this capture may ask for, by name.
        orders: op -> names of its layers in the order of creation.
    """

    kind: str
    implementation: str | None
    blocks: dict[str, nn.Module]
    routed: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    orders: dict[str, list[str]]


def plan(model: PreTrainedModel, choice: str, *, bodies: bool = False) -> ExpertsPlan:
    """Decide, from the option and from what the model is.

    Args:
        model: the model.
        choice: `Options.experts`.
        bodies: whether the bodies of opaque experts get compiled, too. `"auto"` then means opaque on a CPU: a
            compiled body takes the implementation that suits the number of tokens (gpt-oss, tiny, 36 layers, two
            cores: a decode step of 5.2 ms against 8.2 inline, a prefill of 128 tokens 22.8 against 24.3).
    """
    modules = dict(model.named_modules())
    attention, mixers = attention_layers(model), token_mixers(model)
    sharded = sharded_modules(model)
    all_experts, all_routed = experts_layers(model), routed_experts_layers(model)
    experts, routed_only = _without(sharded, all_experts), _without(sharded, all_routed)
    orders = {"glowplug::attention": list(attention), "glowplug::kv_cache_update": list(attention)}
    orders["glowplug::mixer"] = [name for name in mixers if name not in attention]
    orders["glowplug::sharded"] = list(sharded)
    rotary = rotary_layers(model)
    orders["glowplug::rotary"] = [name for name, module in rotary.items() for _ in rope_types(module)]
    hidden_size = model.config.get_text_config().hidden_size
    probe = choice != "inline" and not sharded
    untraceable = untraceable_blocks(model, hidden_size, all_experts | all_routed | mixers) if probe else {}
    seen = mixers.keys() | sharded.keys() | rotary.keys() | untraceable.keys()
    always = {name: m for name, m in modules.items() if name in seen}
    hidden = any(name in sharded for name in all_experts)
    if not experts and not routed_only:
        orders["glowplug::moe_forward_shared"] = list(untraceable)
        return ExpertsPlan("opaque" if hidden or untraceable else "none", None, untraceable, {}, always, orders)
    own = getattr(model.config.get_text_config(), "_experts_implementation", None)
    on_cpu = next(model.parameters()).device.type == "cpu"
    inline = (own in _TRACEABLE or not experts) and not (bodies and on_cpu)
    if choice == "inline" or (choice == "auto" and inline):
        implementation = (own if own in _TRACEABLE else _TRACEABLE[0]) if experts else None
        return ExpertsPlan("inline", implementation, {}, {}, always, orders)
    blocks = shared_blocks(model, hidden_size, all_experts)
    covered = {id(module) for block in blocks.values() for module in block.modules()}
    behind = {**experts, **routed_only}
    routed = {name: m for name, m in modules.items() if name in behind and id(m) not in covered}
    orders["glowplug::moe_forward"] = list(routed)
    orders["glowplug::moe_forward_shared"] = list(blocks)
    layers = {name: m for name, m in modules.items() if name in always or name in routed or name in blocks}
    return ExpertsPlan("opaque", NAME if experts else None, blocks, routed_only, layers, orders)


def _without(sharded: dict[str, nn.Module], found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules that are not distributed over processes: those run behind `glowplug::sharded`."""
    return {name: module for name, module in found.items() if name not in sharded}


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


def stack_of(model: nn.Module, read: Collection[str] | None = None) -> LayerStack | None:
    """The stack of a transformers model: each of its layers mixes tokens.

    Args:
        model: the model.
        read: see `glowplug.layers.kinds.tell_apart`.
    """
    config: Any = model.config
    return find_stack(model, list(token_mixers(model).values()), config.get_text_config(), read)
