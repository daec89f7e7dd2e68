"""What a stored program depends on.

Everything known before the trace goes into the program's address: the model's structure, the code of its classes,
versions, switches and options. So programs for two versions of a model's code can coexist. Dependencies that only the
trace reveals (other source files, values of Python modules) are written to the record and compared when it is read.
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

_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_VERSIONED = (str(Path(torch.__file__).parent) + os.sep, "<frozen ", "<string>")
"""Prefixes of files that the versions in the address already cover."""


def address(facts: Mapping[str, Any]) -> str:
    """The hash of the named facts; `glowplug.compilers.environment.differences` explains how two sets differ."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# -- code --------------------------------------------------------------------------------------------------------


def class_modules(model: nn.Module) -> set[str]:
    """Names of the Python modules that define the classes of a model's modules and their base classes."""
    return {base.__module__ for cls in set(map(type, model.modules())) for base in cls.__mro__}


def modules_of(files: Iterable[str]) -> set[str]:
    """Names of the Python modules that were loaded from these files; NotStorableError for a file of no module."""
    names = {file: name for name in list(sys.modules) if (file := _file_of(name))}
    wanted = [file for file in files if not _has_version(file)]
    for file in wanted:
        if file not in names:
            raise NotStorableError(f"the trace ran code from a file of no Python module: {file}")
    return {names[file] for file in wanted}


def sources_of(modules: Iterable[str]) -> dict[str, str]:
    """Module name -> SHA-256 of its file; NotStorableError for a file that can't be read.

    Skips torch and the standard library, whose versions are part of the address.
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
    return file.startswith(_VERSIONED) or (file.startswith(_STDLIB) and "site-packages" not in file)


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
    """The first module whose file differs from what `sources_of` recorded, in words; None if all are the same."""
    for name, digest in sources.items():
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except Exception:  # an import can raise anything
                return f"the Python module {name} is gone"
        file = _file_of(name)
        if file is None or _digest(file) != digest:
            return f"the source of {name} was changed"
    return None


# -- values of Python modules ------------------------------------------------------------------------------------


def globals_of(reads: Iterable[str]) -> dict[str, str]:
    """Source -> text, the same in every process, for each plain value or function that a trace read from Python
    modules or from objects in them."""
    return {source: text for source in sorted(reads) if (text := _global(source)) is not None}


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
    """The first value that differs from what `globals_of` recorded, in words; None if all are the same."""
    for source, text in values.items():
        if _global(source) != text:
            return f"{source} was {text}, and has changed"
    return None
