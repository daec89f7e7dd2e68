"""Layer ops: custom ops that receive their layer object, and the ones that glowplug defines."""

from glowplug.ops.attention import attention, kv_cache_update
from glowplug.ops.layer_op import LayerOp, find_layer_op, known_layer_ops, layer_op, order_layers
from glowplug.ops.moe import moe_forward, moe_forward_shared

__all__ = [
    "LayerOp",
    "attention",
    "find_layer_op",
    "known_layer_ops",
    "kv_cache_update",
    "layer_op",
    "moe_forward",
    "moe_forward_shared",
    "order_layers",
]
