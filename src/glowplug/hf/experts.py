"""What happens to a model's experts in a capture: left in the graph, or hidden behind a layer op."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from glowplug.hf import interfaces
from glowplug.hf.rotary_entry import rope_types, rotary_layers
from glowplug.hf.sharding import sharded_modules

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
    attention, mixers = interfaces.attention_layers(model), interfaces.token_mixers(model)
    sharded = sharded_modules(model)
    all_experts, all_routed = interfaces.experts_layers(model), interfaces.routed_experts_layers(model)
    experts, routed_only = _without(sharded, all_experts), _without(sharded, all_routed)
    orders = {"glowplug::attention": list(attention), "glowplug::kv_cache_update": list(attention)}
    orders["glowplug::mixer"] = [name for name in mixers if name not in attention]
    orders["glowplug::sharded"] = list(sharded)
    rotary = rotary_layers(model)
    orders["glowplug::rotary"] = [name for name, module in rotary.items() for _ in rope_types(module)]
    hidden_size = model.config.get_text_config().hidden_size
    probe = choice != "inline" and not sharded
    untraceable = interfaces.untraceable_blocks(model, hidden_size, all_experts | all_routed | mixers) if probe else {}
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
    blocks = interfaces.shared_blocks(model, hidden_size, all_experts)
    covered = {id(module) for block in blocks.values() for module in block.modules()}
    behind = {**experts, **routed_only}
    routed = {name: m for name, m in modules.items() if name in behind and id(m) not in covered}
    orders["glowplug::moe_forward"] = list(routed)
    orders["glowplug::moe_forward_shared"] = list(blocks)
    layers = {name: m for name, m in modules.items() if name in always or name in routed or name in blocks}
    return ExpertsPlan("opaque", interfaces.NAME if experts else None, blocks, routed_only, layers, orders)


def _without(sharded: dict[str, nn.Module], found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules that are not distributed over processes: those run behind `glowplug::sharded`."""
    return {name: module for name, module in found.items() if name not in sharded}
