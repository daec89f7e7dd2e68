"""Which of a module's attributes its forward may read: the one place for attribute names.

Names of torch were checked on 2.11 and 2.13, names of transformers on 5.17 and 5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

HANDLE_ATTR = "_glowplug_handle"
OTHER_ATTR = "_glowplug_other"
MARKS = frozenset({HANDLE_ATTR, OTHER_ATTR})
"""Attributes that registration sets on a layer. They identify the layer and never affect what it computes."""

TABLES = ("_parameters", "_buffers", "_modules")
"""Where a module keeps its tensors and children."""

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Where a module keeps the hooks that a call runs."""

FORWARD_HOOKS = tuple(name for name in vars(nn.Module()) if name.startswith("_forward") and "hooks" in name)
"""`CALL_HOOKS` and the tables that say how to run them."""

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Where `torch.nn.modules.module` keeps the hooks that apply to every module."""

STANDARD = frozenset(vars(nn.Module()))
"""Attributes that every module has: flags, tables and hooks. Those that a forward reads are handled separately."""

PRINTED = frozenset({"extra_repr", "_get_name", "__repr__", "__str__"})
"""Methods that only print a module."""

NOT_WATCHED = frozenset(
    {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "__class__",
        "_experts_implementation_internal",  # the engine compares it itself, since some values are equivalent
    }
)
"""Attributes that a trace reads without depending on them."""

LOADING = frozenset(
    {
        "_commit_hash",
        "_ep_plan",
        "_experts_implementation_internal",
        "_fsdp_plan",
        "_is_hf_initialized",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
        "_keys_to_ignore_on_save",
        "_name_or_path",
        "_no_split_modules",
        "_output_attentions",
        "_pp_plan",
        "_skip_keys_device_placement",
        "_tp_plan",
        "_use_kernels",
        "_weight_conversions",
        "all_tied_weights_keys",
        "architectures",
        "dtype",
        "generation_config",
        "hf_device_map",
        "id2label",
        "kernel_config",
        "label2id",
        "loss_type",
        "name_or_path",
        "rope_deltas",
        "transformers_version",
        "transformers_weights",
        "_glowplug_attention_fn",
    }
)
"""Attributes of transformers' models and configurations that say how to load or train a model, not how it computes."""

_INERT = "transformers.utils.output_capturing"
_OWN = frozenset({"torch", "glowplug", "builtins"})


def without_inert(hooks: dict[Any, Any]) -> dict[Any, Any]:
    """Drop the hooks that transformers leaves behind after a call that requested hidden states or attentions. They do
    nothing unless a call requests them again, and such a call runs eagerly."""
    return {key: hook for key, hook in hooks.items() if getattr(hook, "__module__", None) != _INERT}


def hooks_of(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Table name -> its hooks, for the hooks that a call of a module runs."""
    tables = {table: module.__dict__[table] for table in CALL_HOOKS}
    return {table: running for table, hooks in tables.items() if hooks and (running := without_inert(hooks))}


def attributes_read(module: nn.Module, but: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """The attributes that a module's forward may read, except those in `but`. A `forward` of its own is included."""
    for name, value in module.__dict__.items():
        if not (name in STANDARD or name in MARKS or name in but):
            yield name, value


def is_own(module: str) -> bool:
    """Whether a Python module is part of torch, glowplug or Python, whose versions already identify the code."""
    return module.partition(".")[0] in _OWN
