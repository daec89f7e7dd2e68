"""Prepares Inductor for its first CPU kernel: chooses the vector instruction set and precompiles the C++ header.

This runs in a thread during the trace, as most of the work happens in other processes.

Uses Inductor's list of instruction sets, its code cache and `cpp.vec_isa_ok` (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

from glowplug.reasons import no_cpp_compiler, no_folder, why
from glowplug.runtime.forks import begin_thread, in_forks

_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) {
    at::vec::Vectorized<float>(1).exp().store(out);
}
"""
"""Includes what Inductor's kernels include. It is never compiled, but requesting it precompiles the header."""
_PATIENCE_S = 120.0
"""How long to wait for the compiler. After that, Inductor runs it again by itself."""


class CpuToolchain:
    """The C++ toolchain of Inductor in this process.

    To find out which instruction sets work, Inductor compiles and loads test programs, which takes seconds. The
    processor reports its instruction sets itself, so only the compiler is in doubt. While `trusted`, a quick check of
    whether the compiler accepts the flags replaces these tests. If a piece then fails to compile, they run after all.
    """

    def __init__(self) -> None:
        self.trusted = _is_x86()
        self._known = threading.Event()
        self.prepared = False
        self._thread = begin_thread(self._prepare, "glowplug-toolchain")

    def wait(self) -> None:
        """Wait until the instruction set is known or the wait times out. The header may not be ready yet."""
        self._known.wait(_PATIENCE_S)

    def join(self) -> bool:
        """Wait until everything is prepared; returns whether it is."""
        self._thread.join(_PATIENCE_S)
        return self.prepared

    def options(self) -> dict[str, Any]:
        """Inductor options to compile with."""
        return {"cpp.vec_isa_ok": True} if self.trusted else {}

    def distrust(self) -> bool:
        """Go back to Inductor's own tests; returns whether that can help, that is, whether they were skipped."""
        if not self.trusted:
            return False
        self.trusted = False
        from torch._inductor import cpu_vec_isa

        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            for attribute in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
                vars(isa).pop(attribute, None)
            for method in ("__bool__", "is_avx512_bf16_supported", "is_amx_fp16_supported"):
                clear = getattr(getattr(type(isa), method, None), "cache_clear", None)
                if clear is not None:
                    clear()
        return True

    def _prepare(self) -> None:
        try:
            from torch._inductor import config, cpu_vec_isa
            from torch._inductor.codecache import CppPythonBindingsCodeCache

            patched: Any = config.patch(self.options())
            with patched:
                with _quick_tests(cpu_vec_isa) if self.trusted else nullcontext():
                    cpu_vec_isa.valid_vec_isa_list()
                self._known.set()
                CppPythonBindingsCodeCache.load_pybinding_async(["float*"], _KERNEL, submit_fn=_skip_compilation)
        except Exception:
            self.distrust()  # compiling a piece will hit and report a real fault
        finally:
            self._known.set()
            self.prepared = True


@contextlib.contextmanager
def _quick_tests(cpu_vec_isa: Any) -> Iterator[None]:
    """Reduce Inductor's tests of instruction sets to whether the compiler accepts their flags."""
    cls = cpu_vec_isa.VecISA
    _tests.setdefault(cls, cls.check_build)
    cls.check_build = _accepts_flags
    try:
        yield
    finally:
        cls.check_build = _tests[cls]


_tests: dict[Any, Any] = {}
"""Class -> Inductor's own test of its instruction set."""


def _accepts_flags(isa: Any, _code: str) -> bool:
    """Whether the C++ compiler accepts an instruction set's flags; replaces `VecISA.check_build`."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), *shlex.split(isa.build_arch_flags()), "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode == 0


def _skip_compilation(_compile: Any) -> None:
    """Replaces the function that would compile a kernel in the background."""


@lru_cache(maxsize=1)
def cpu_toolchain() -> CpuToolchain:
    """The toolchain of this process. The first call starts its preparation and returns at once."""
    return CpuToolchain()


def toolchain_begun() -> bool:
    """Whether this process has started to prepare its toolchain."""
    return cpu_toolchain.cache_info().currsize > 0


@in_forks
def _restart() -> None:
    """A fork lacks the thread that was preparing the toolchain, and must start again."""
    if toolchain_begun() and not cpu_toolchain().prepared:
        cpu_toolchain.cache_clear()
        for cls, own in _tests.items():
            cls.check_build = own


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(torch._inductor.config.cpp, "vec_isa_ok")


def why_no_cpp_compiler() -> str | None:
    """Why Inductor has no C++ compiler, judged without running one; None if it may have one."""
    from torch._inductor import config

    cxx = config.cpp.cxx
    names = [name for name in (cxx if isinstance(cxx, (list, tuple)) else [cxx]) if name is not None]
    installs = os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")  # Inductor then installs one by itself
    if sys.platform == "win32" or installs or any(map(shutil.which, names)):
        return None
    variable = os.environ.get("CXX")
    return no_cpp_compiler() if not variable else f"CXX={variable} is no program that can be run; {no_cpp_compiler()}"


def why_no_folder(device_type: str) -> str | None:
    """Why Inductor can't use its cache folder; None if it can."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    try:
        folder = os.path.abspath(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    except OSError as exc:  # there is no usable temporary folder
        return f"there is no temporary folder: {why(exc)}; set TMPDIR to one that can be written to"
    if device_type == "cpu" and any(map(str.isspace, folder)):
        return no_folder(folder, "its C++ commands can't name a folder with a space in its name")
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as exc:
        return no_folder(folder, exc.strerror or type(exc).__name__)
    return None
