"""A copy of a model to be traced: it has the model's weights, and modules and configurations of its own. What a trace
is to see in the place of attention, experts and forwards is put there, and other threads that use the model meanwhile,
`generate()` among them, see nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig

from glowplug.layers.copies import TreeCopy


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
