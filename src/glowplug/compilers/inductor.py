"""The Inductor piece compiler. The one place that calls `standalone_compile` (private; checked on torch 2.11, 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from glowplug.errors import UnsupportedTorchError

try:
    from torch._inductor import standalone_compile
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        f"this torch has no torch._inductor.standalone_compile ({exc}). Install torch>=2.11."
    ) from exc


class InductorCompiler:
    """Compiles a piece with Inductor, symbolic in whatever sizes the capture made symbolic.

    Args:
        options: Inductor options, as for `torch.compile(options=...)`.
    """

    name = "inductor"

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})

    def compile(self, piece: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Sequence[Any]]:
        """See `PieceCompiler.compile`."""
        artifact = standalone_compile(
            piece, list(inputs), dynamic_shapes="from_tracing_context", options=dict(self.options)
        )
        # The artifact's own __call__ adds a frame and nothing else.
        return getattr(artifact, "_compiled_fn", artifact)
