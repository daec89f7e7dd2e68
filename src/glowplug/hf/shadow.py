"""A copy of a model to be traced: it has the model's weights, and modules and configurations of its own. What a trace
is to see in the place of attention, experts and forwards is put there, and other threads that use the model meanwhile,
`generate()` among them, see nothing of it.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


class Shadow:
    """The copy of a tree of modules.

    Args:
        root: the tree's root; it stays as it is.

    Attributes:
        root: the copy's root.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self.root = self._copy(root)
        for module in self._modules.values():
            for name, value in module.__dict__.items():
                module.__dict__[name] = self._rebound(value)

    def of(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The copies of those of some modules that lie in the tree."""
        return {name: self._modules[id(m)] for name, m in modules.items() if id(m) in self._modules}

    @property
    def configs(self) -> list[Any]:
        """The copy's configurations."""
        return list(self._configs.values())

    def put_in_force(self, *, attention: str | None = None, experts: str | None = None) -> None:
        """Let the copy compute with other implementations of attention or experts."""
        for config in self.configs:
            if attention is not None and hasattr(config, "_attn_implementation_internal"):
                config._attn_implementation_internal = attention
            if experts is not None:
                config._experts_implementation_internal = experts

    def _copy(self, module: nn.Module) -> nn.Module:
        made = self._modules.get(id(module))
        if made is None:
            made = self._modules[id(module)] = object.__new__(type(module))
            made.__dict__.update(module.__dict__)
            children = {
                name: self._copy(child) if child is not None else None for name, child in module._modules.items()
            }
            made.__dict__["_modules"] = children
        return made

    def _copy_config(self, config: Any) -> Any:
        made = self._configs.get(id(config))
        if made is None:
            made = self._configs[id(config)] = copy.copy(config)
            for name, value in vars(config).items():
                if isinstance(value, PreTrainedConfig):
                    vars(made)[name] = self._copy_config(value)
        return made

    def _rebound(self, value: Any) -> Any:
        """An attribute of a module as its copy has it."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, PreTrainedConfig):
            return self._copy_config(value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self._modules:
            return types.MethodType(value.__func__, self._modules[id(value.__self__)])
        if type(value) is functools.partial and any(id(given) in self._modules for given in value.args):
            args = [self._modules.get(id(given), given) for given in value.args]
            return functools.partial(value.func, *args, **value.keywords)
        return value
