"""Finds a transformers model's attention layers, other token mixers, experts and layer stack, and decides whether a
trace leaves the experts in the graph or hides them behind a layer op. Checked on transformers 5.17 and 5.23.
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
from glowplug.layers.reads import hooks_of
from glowplug.layers.stack import LayerStack, find_stack
from glowplug.ops.attention import ATTENTION_FN_ATTR, layer_index
from glowplug.ops.expert_linear import has_kernel
from glowplug.ops.moe import shared_experts_name

NAME = "glowplug"
"""glowplug's entry in transformers' interfaces."""
_CACHE_ARGUMENTS = {"cache_params", "past_key_values", "past_key_value", "layer_past"}
_READS_VALUES = {"tolist", "item", "nonzero"}
"""Methods that take a tensor's values into Python."""
_TRACEABLE = ("grouped_mm", "batched_mm")
BY_EXPERT = "glowplug_by_expert"
"""glowplug's own experts implementation for the graph: two calls of `glowplug::expert_linear`."""
SAME_EXPERTS = (None, "eager", *_TRACEABLE)
"""Experts implementations between which generate() itself switches on a GPU; they compute the same."""


class Shadow(TreeCopy):
    """A `TreeCopy` that copies transformers' configurations, too."""

    def __init__(self, root: nn.Module, into: Callable[[nn.Module], bool] | None = None) -> None:
        super().__init__(root, into, (PreTrainedConfig,))

    def put_in_force(self, *, attention: str | None = None, experts: str | None = None) -> None:
        """Switch the copy to other implementations of attention or experts."""
        for config in self.configs:
            if attention is not None and hasattr(config, "_attn_implementation_internal"):
                config._attn_implementation_internal = attention
            if experts is not None:
                config._experts_implementation_internal = experts


@dataclass(frozen=True)
class ExpertsPlan:
    """How a trace treats a model's experts.

    Attributes:
        mode: `"inline"`, `"opaque"`, or `"none"` if glowplug recognises no experts.
        implementation: the experts implementation for the trace; None for the model's own.
        blocks: blocks that run whole, behind `glowplug::moe_forward_shared`.
        routed: experts that take routed tokens and run behind `glowplug::moe_forward`.
        layers: every layer that an op of the trace may ask for, by name.
        orders: op -> names of its layers in the order of creation.
    """

    mode: str
    implementation: str | None
    blocks: dict[str, nn.Module]
    routed: dict[str, nn.Module]
    layers: dict[str, nn.Module]
    orders: dict[str, list[str]]


def plan(model: PreTrainedModel, choice: str, *, bodies: bool = False) -> ExpertsPlan:
    """Decide how a trace treats the experts.

    Args:
        model: the model.
        choice: `Options.experts`.
        bodies: whether the bodies of opaque experts get compiled. On a CPU, `"auto"` then means opaque: a compiled body
            uses the implementation that suits the number of tokens (tiny gpt-oss, 36 layers, two cores: a decode step
            took 5.2 ms, inline 8.2; a prefill of 128 tokens took 22.8 ms, inline 24.3).
    """
    modules = dict(model.named_modules())
    attention, mixers = attention_layers(model), token_mixers(model)
    sharded = sharded_modules(model)
    all_experts, all_routed = experts_layers(model), _routed_experts_layers(model)
    # Distributed experts run behind `glowplug::sharded`.
    experts = {name: module for name, module in all_experts.items() if name not in sharded}
    routed_only = {name: module for name, module in all_routed.items() if name not in sharded}
    orders = {"glowplug::attention": list(attention), "glowplug::kv_cache_update": list(attention)}
    orders["glowplug::mixer"] = [name for name in mixers if name not in attention]
    orders["glowplug::sharded"] = list(sharded)
    rotary = rotary_layers(model)
    orders["glowplug::rotary"] = [name for name, module in rotary.items() for _ in rope_types(module)]
    hidden_size = model.config.get_text_config().hidden_size
    probe = choice != "inline" and not sharded
    untraceable = _untraceable_blocks(model, hidden_size, all_experts | all_routed | mixers) if probe else {}
    always = mixers.keys() | sharded.keys() | rotary.keys() | untraceable.keys()
    layers = {name: m for name, m in modules.items() if name in always}
    if not experts and not routed_only:
        orders["glowplug::moe_forward_shared"] = list(untraceable)
        opaque = untraceable or any(name in sharded for name in all_experts)
        return ExpertsPlan("opaque" if opaque else "none", None, untraceable, {}, layers, orders)
    own = getattr(model.config.get_text_config(), "_experts_implementation", None)
    on_cpu = next(model.parameters()).device.type == "cpu"
    inline = (own in _TRACEABLE or not experts) and not (bodies and on_cpu)
    if choice == "inline" or (choice == "auto" and inline):
        implementation = _traced_implementation(own, experts) if experts else None
        return ExpertsPlan("inline", implementation, {}, {}, layers, orders)
    blocks = _shared_blocks(model, hidden_size, all_experts)
    in_blocks = {id(module) for block in blocks.values() for module in block.modules()}
    opaque_experts = experts.keys() | routed_only.keys()
    routed = {name: m for name, m in modules.items() if name in opaque_experts and id(m) not in in_blocks}
    orders["glowplug::moe_forward"] = list(routed)
    orders["glowplug::moe_forward_shared"] = list(blocks)
    layers = {name: m for name, m in modules.items() if name in layers or name in routed or name in blocks}
    return ExpertsPlan("opaque", NAME if experts else None, blocks, routed_only, layers, orders)


def _traced_implementation(own: str | None, experts: Mapping[str, nn.Module]) -> str:
    """The implementation that a trace leaves in the graph, for a model's own one and all of its experts."""
    if own in SAME_EXPERTS and all(map(_takes_kernel, experts.values())):
        return BY_EXPERT
    return own if own in _TRACEABLE else _TRACEABLE[0]


def _takes_kernel(layer: nn.Module) -> bool:
    """Whether experts are of plain weights, which the kernel of `glowplug::expert_linear` takes, and nothing is put
    around their forward."""
    tables = [layer._parameters.get(name) for name in ("gate_up_proj" if _has_gate(layer) else "up_proj", "down_proj")]
    weights = [weight for weight in tables if weight is not None]
    return (
        len(weights) == 2
        and "forward" not in layer.__dict__
        and not hooks_of(layer)
        and len({weight.dtype for weight in weights}) == 1
        and weights[0].dtype in (torch.bfloat16, torch.float16, torch.float32)
        and all(weight.dim() == 3 and (type(weight) is nn.Parameter or is_fake(weight)) for weight in weights)
        and has_kernel(weights[0].device)
    )


def _has_gate(layer: Any) -> bool:
    return bool(getattr(layer, "has_gate", True))


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's attention modules that own a layer of the cache, by name."""
    return {name: module for name, module in _indexed(model).items() if hasattr(module, "is_causal")}


def mixer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that mix tokens by cached states of their own instead of keys and values, by name."""
    indexed = _indexed(model)
    outer = {parent for name in indexed for parent in _parents(name)}
    return {
        name: module
        for name, module in indexed.items()
        if name not in outer
        and not hasattr(module, "is_causal")
        and _CACHE_ARGUMENTS & set(inspect.signature(type(module).forward).parameters)
    }


def token_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Attention layers and other mixers, by name, in the model's order."""
    names = attention_layers(model).keys() | mixer_layers(model).keys()
    return {name: module for name, module in model.named_modules() if name in names}


def _indexed(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules that know their layer index, by name."""
    return {name: module for name, module in model.named_modules() if layer_index(module) is not None}


def _parents(name: str) -> Iterator[str]:
    """Names of the modules around a module."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def experts_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose forward goes through transformers' experts interface, by name."""
    return {name: module for name, module in model.named_modules() if _uses_interface(type(module))}


def _uses_interface(cls: type[nn.Module]) -> bool:
    """Whether transformers' experts decorator wraps the class's forward."""
    module = getattr(cls.forward, "__globals__", {}).get("__name__")
    return bool(module == ALL_EXPERTS_FUNCTIONS.__class__.__module__)


def _routed_experts_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Experts that bypass transformers' experts interface and take routed tokens (Llama 4), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "experts"
        and not _uses_interface(type(module))
        and _has_stacked_weights(module)
        and len(inspect.signature(type(module).forward).parameters) == 2
    }


def _shared_blocks(model: nn.Module, hidden_size: int, experts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Blocks of shared experts and some of these routed `experts` that keep the shape of their input, by name."""
    routed = {id(module) for module in experts.values()}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if id(module._modules.get("experts")) in routed and shared_experts_name(module) is not None
    }
    return _shape_preserving(candidates, hidden_size)


def _shape_preserving(modules: dict[str, nn.Module], hidden_size: int) -> dict[str, nn.Module]:
    """The modules that map hidden states to a tensor of the same shape, except those with a forward of their own. Each
    class is probed once with two zero tokens; if the weights are fake, with `batched_mm` experts, which that needs."""
    verdicts: dict[type, bool] = {}
    modules = {name: module for name, module in modules.items() if "forward" not in module.__dict__}
    for module in modules.values():
        cls = type(module)
        if cls not in verdicts:
            parameter = next(module.parameters())
            try:
                probed = module
                if is_fake(parameter):
                    shadow = Shadow(module)
                    shadow.put_in_force(experts="batched_mm")
                    probed = shadow.root
                with torch.no_grad(), in_mode_of(parameter):
                    tokens = torch.zeros(1, 2, hidden_size, dtype=parameter.dtype, device=parameter.device)
                    output = cls.forward(probed, tokens)
                verdicts[cls] = isinstance(output, Tensor) and output.shape == tokens.shape
            except (TypeError, RuntimeError, ValueError, NotImplementedError):
                verdicts[cls] = False
    return {name: module for name, module in modules.items() if verdicts[type(module)]}


def _untraceable_blocks(model: nn.Module, hidden_size: int, known: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Blocks that bypass transformers' interfaces and read the number of tokens per expert in Python, which no trace
    can do; by name. Only innermost blocks, and none in or around a module of `known` (experts, token mixers)."""
    in_known = {id(part) for module in known.values() for part in module.modules()}
    if not any(_has_stacked_weights(module) for module in model.modules() if id(module) not in in_known):
        return {}
    candidates = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in in_known
        and len(inspect.signature(type(module).forward).parameters) == 2
        and not any(id(part) in in_known for part in module.modules())
        and any(parameter.dim() == 3 for parameter in module.parameters())
        and any(_reads_values(type(part)) for part in module.modules())  # type: ignore[arg-type]
    }
    outer = {parent for name in candidates for parent in _parents(name)}
    return _shape_preserving({name: m for name, m in candidates.items() if name not in outer}, hidden_size)


def _has_stacked_weights(module: nn.Module) -> bool:
    """Whether the module itself has a weight of three dimensions, as experts do."""
    return any(parameter.dim() == 3 for parameter in module._parameters.values() if parameter is not None)


@functools.lru_cache(maxsize=1024)
def _reads_values(cls: type[nn.Module]) -> bool:
    """Whether a method of the class takes a tensor's values into Python."""
    return any(
        _READS_VALUES & set(code.co_names)
        for base in cls.__mro__
        if not base.__module__.startswith("torch.")
        for function in vars(base).values()
        if (code := getattr(inspect.unwrap(function), "__code__", None)) is not None
    )


def give_attention_functions(model: PreTrainedModel) -> None:
    """Store in each attention layer the function that `glowplug::attention` runs for it.

    Raises:
        CaptureError: a layer's function can't be found.
    """
    for name, layer in attention_layers(model).items():
        implementation = getattr(layer, "config", model.config)._attn_implementation_internal
        if implementation in ALL_ATTENTION_FUNCTIONS:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        else:
            forward = inspect.unwrap(type(layer).forward)
            function = getattr(forward, "__globals__", {}).get("eager_attention_forward")
        if function is None:
            raise CaptureError(f"{name} runs an attention function that glowplug can't find")
        object.__setattr__(layer, ATTENTION_FN_ATTR, function)


def stack_of(model: nn.Module, read: Collection[str] | None = None) -> LayerStack | None:
    """The stack of the layers that hold the token mixers; for `read` see `glowplug.layers.kinds.tell_apart`."""
    config: Any = model.config
    return find_stack(model, list(token_mixers(model).values()), config.get_text_config(), read)
