"""What a program depends on: by its address, as far as that is known before a trace, and else by what its record says.

An address names the model's structure, the code of its classes, versions, switches and options, so that programs of
two versions of a model's code lie next to each other. What only a trace shows, other files and values of Python
modules, is compared when a record is read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glowplug.errors import NotStorableError
from glowplug.graph.sources import follow, parse
from glowplug.layers.reads import is_own
from glowplug.layers.structure import code_text

_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_VERSIONED = (str(Path(torch.__file__).parent) + os.sep, "<frozen ", "<string>")


def address(facts: Mapping[str, Any]) -> str:
    """The address of what depends on these facts, given by name; see `glowplug.compilers.environment.differences`."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# -- code --------------------------------------------------------------------------------------------------------


def class_modules(model: nn.Module) -> set[str]:
    """Names of the Python modules that define the classes of a model's modules, and their bases."""
    return {base.__module__ for cls in set(map(type, model.modules())) for base in cls.__mro__}


def modules_of(files: Iterable[str]) -> set[str]:
    """Names of the Python modules whose files these are.

    Raises:
        NotStorableError: one is the file of none.
    """
    names = {file: name for name in list(sys.modules) if (file := _file_of(name))}
    wanted = [file for file in files if not _has_version(file)]
    for file in wanted:
        if file not in names:
            raise NotStorableError(f"code was traced that is in no Python module's file: {file}")
    return {names[file] for file in wanted}


def sources_of(modules: Iterable[str]) -> dict[str, str]:
    """Name of each Python module that has a file -> SHA-256 of it. Not of torch and Python's own, whose versions a
    program's address names.

    Raises:
        NotStorableError: a file can't be read.
    """
    sources = {}
    for name in sorted(modules):
        file = _file_of(name)
        if file is not None and not _has_version(file):
            digest = _digest(file)
            if digest is None:
                raise NotStorableError(f"the file of the Python module {name} can't be read: {file}")
            sources[name] = digest
    return sources


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _has_version(file: str) -> bool:
    return file.startswith(_VERSIONED) or (file.startswith(_LIBRARY) and "site-packages" not in file)


def _digest(file: str) -> str | None:
    try:
        status = os.stat(file)
        return _digest_of(file, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@functools.cache
def _digest_of(file: str, _changed: int, _size: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def changed_source(sources: Mapping[str, str]) -> str | None:
    """Which of the modules that `sources_of` wrote down is another one here, in words; None when none is."""
    for name, digest in sources.items():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # whatever importing it raises
                return f"the Python module {name} is gone"
        file = _file_of(name)
        if file is None or _digest(file) != digest:
            return f"the source of {name} was changed"
    return None


# -- values of Python modules ------------------------------------------------------------------------------------


def globals_of(reads: Iterable[str]) -> dict[str, str]:
    """Source of each plain value and function of Python modules, or of objects in them, that a trace read -> the value,
    as text that is the same in every process."""
    values = ((source, _global(source)) for source in sorted(reads))
    return {source: text for source, text in values if text is not None}


def _global(text: str) -> str | None:
    source = parse(text)
    if source is None or not source.is_global or is_own(source.root):
        return None
    try:
        value = follow(sys.modules[source.root], source.path)[-1]
    except (AttributeError, LookupError, TypeError):
        return "missing"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    code = getattr(value, "__code__", None)
    if code is None or is_own(getattr(value, "__module__", None) or ""):
        return None
    return f"{value.__module__}.{value.__qualname__} {code_text(code)[:16]}"


def changed_global(values: Mapping[str, str]) -> str | None:
    """Which of the values that `globals_of` wrote down is another one here, in words; None when none is."""
    for source, text in values.items():
        if _global(source) != text:
            return f"{source} was {text}, and has changed"
    return None
