"""Copies of modules that share their weights: the one place where modules are copied."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from glowplug.errors import NotStampableError
from glowplug.layers.reads import MARKS
from glowplug.layers.registry import LayerRegistry, register_layers
from glowplug.reasons import said


def shallow_copy(module: nn.Module) -> nn.Module:
    """Copy a module and its tables of attributes and children, but nothing in them."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


class TreeCopy:
    """A copy of a tree of modules that shares every weight. References between copied modules (attributes, bound
    methods, partial functions) point to the copies.

    Args:
        root: the tree's root. It is not changed.
        into: whether to copy a module below the root and descend into it; other modules are shared. None copies all.
        configs: classes of configuration objects to copy as well, nested ones included.

    Attributes:
        root: the copy's root.
        configs: the copied configurations.
    """

    def __init__(
        self, root: nn.Module, into: Callable[[nn.Module], bool] | None = None, configs: tuple[type, ...] = ()
    ) -> None:
        self._into = into
        self._config_types = configs
        self._modules: dict[int, nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self.root = self._copy(root)
        for module in self._modules.values():
            for name, value in module.__dict__.items():
                module.__dict__[name] = self._rebound(value)
        self.configs = list(self._configs.values())

    def of(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The copies of the given modules, without those that were not copied."""
        return {name: self._modules[id(module)] for name, module in modules.items() if id(module) in self._modules}

    def _copy(self, module: nn.Module) -> nn.Module:
        copied = self._modules.get(id(module))
        if copied is None:
            copied = self._modules[id(module)] = shallow_copy(module)
            for name, child in module._modules.items():
                if child is not None and (self._into is None or self._into(child)):
                    copied._modules[name] = self._copy(child)
        return copied

    def _copy_config(self, config: Any) -> Any:
        copied = self._configs.get(id(config))
        if copied is None:
            copied = self._configs[id(config)] = copy.copy(config)
            for name, value in vars(config).items():
                if isinstance(value, self._config_types):
                    vars(copied)[name] = self._copy_config(value)
        return copied

    def _rebound(self, value: Any) -> Any:
        """An attribute's value, with modules and configurations replaced by their copies."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, self._config_types):
            return self._copy_config(value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self._modules:
            return types.MethodType(value.__func__, self._modules[id(value.__self__)])
        if type(value) is functools.partial and any(id(arg) in self._modules for arg in value.args):
            args = [self._modules.get(id(arg), arg) for arg in value.args]
            return functools.partial(value.func, *args, **value.keywords)
        return value


@dataclass(frozen=True)
class Twin:
    """A copy of a module that shares its parameters but has its own state, so that trials leave the original alone.

    Attributes:
        model: the copy.
        registry: its layers.
        of: id of an object of the original -> its copy.
    """

    model: nn.Module
    registry: LayerRegistry
    of: Mapping[int, Any]

    @property
    def state(self) -> dict[str, dict[str, Any]]:
        """The buffers and attributes of its modules, by the module's name."""
        hidden = {"_parameters", "_modules", "forward", *MARKS}
        return {
            path: {k: v for k, v in module.__dict__.items() if k not in hidden and not k.endswith("_hooks")}
            for path, module in self.model.named_modules()
        }


def make_twin(model: nn.Module) -> Twin:
    """Copy a module with its state.

    Raises:
        NotStampableError: part of the module can't be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    if "forward" in model.__dict__:  # glowplug's own; the copy must not have it
        memo[id(model.__dict__["forward"])] = "none"
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as exc:
        raise NotStampableError(f"the module can't be copied, so nothing can be compared: {said(exc)}") from exc
    twin.__dict__.pop("forward", None)
    return Twin(twin, register_layers(twin), memo)
