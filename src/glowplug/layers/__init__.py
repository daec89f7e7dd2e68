"""Layer identity: handles, the registry of a model's layers, and the context of one forward pass."""

from glowplug.layers.context import ForwardContext, current_context, forward_context
from glowplug.layers.handle import LayerHandle
from glowplug.layers.registry import LayerRegistry, register_layers

__all__ = ["ForwardContext", "LayerHandle", "LayerRegistry", "current_context", "forward_context", "register_layers"]
