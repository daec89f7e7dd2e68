"""glowplug cold-starts torch.compile in seconds: it compiles each distinct piece of a model once, at any depth."""

from glowplug.errors import UnsupportedTorchError, check_torch, exit_if_command_line

try:
    check_torch()
    from glowplug.api import compile, from_pretrained, report, settle
    from glowplug.errors import (
        CaptureError,
        CompileError,
        GlowplugError,
        LayerLookupError,
        LayerOrderError,
        NotServableError,
        StoreError,
        UsageError,
    )
    from glowplug.explain import Explanation, explain, explain_program
    from glowplug.layers import (
        ForwardContext,
        LayerHandle,
        LayerRegistry,
        current_context,
        forward_context,
        register_layers,
    )
    from glowplug.ops import attention, kv_cache_update, layer_op, moe_forward, moe_forward_shared
    from glowplug.options import Options
    from glowplug.report import ElsewhereReport, Fallback, InsideReport, Report, StoreReport
except UnsupportedTorchError as exc:
    exit_if_command_line(exc)
    raise

__version__ = "0.2.0"

__all__ = [
    "CaptureError",
    "CompileError",
    "ElsewhereReport",
    "Explanation",
    "Fallback",
    "ForwardContext",
    "GlowplugError",
    "InsideReport",
    "LayerHandle",
    "LayerLookupError",
    "LayerOrderError",
    "LayerRegistry",
    "NotServableError",
    "Options",
    "Report",
    "StoreError",
    "StoreReport",
    "UnsupportedTorchError",
    "UsageError",
    "attention",
    "compile",
    "current_context",
    "explain",
    "explain_program",
    "forward_context",
    "from_pretrained",
    "kv_cache_update",
    "layer_op",
    "moe_forward",
    "moe_forward_shared",
    "register_layers",
    "report",
    "settle",
]
