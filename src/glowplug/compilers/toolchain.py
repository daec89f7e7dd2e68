"""What Inductor does once a process, and once a machine, before its first CPU kernel: find the vector instruction set,
precompile its header. Begun in a thread beside the trace, as most of it happens in processes of its own.

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
from glowplug.runtime.forks import begin, in_forks

_KERNEL = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) {
    at::vec::Vectorized<float>(1).exp().store(out);
}
"""
"""Includes what Inductor's kernels include. It is never compiled: asking for it precompiles its header."""
_PATIENCE_S = 120.0
"""How long to wait for the compiler; then Inductor asks it anew, as it would without all this."""


class CpuToolchain:
    """The C++ side of Inductor in this process.

    Inductor finds out which instruction sets work by compiling and loading test programs, for seconds. The processor
    says by itself which it has, so only the compiler is in doubt: while `trusted`, it is asked whether it knows the
    flags, which takes it hundredths of a second. Should a piece then fail to compile, the tests are made after all.
    """

    def __init__(self) -> None:
        self.trusted = _is_x86()
        self._known = threading.Event()
        self.prepared = False
        self._thread = begin(self._prepare, "glowplug-toolchain")

    def wait(self) -> None:
        """Until the instruction set is known, or the compiler does not answer. The header may still be on its way."""
        self._known.wait(_PATIENCE_S)

    def join(self) -> bool:
        """Until everything is prepared; returns whether it is."""
        self._thread.join(_PATIENCE_S)
        return self.prepared

    def options(self) -> dict[str, Any]:
        """Inductor options to compile with."""
        return {"cpp.vec_isa_ok": True} if self.trusted else {}

    def distrust(self) -> bool:
        """Forget what was taken on trust; returns whether anything was, so that trying again can help."""
        if not self.trusted:
            return False
        self.trusted = False
        from torch._inductor import cpu_vec_isa

        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for isa in cpu_vec_isa.supported_vec_isa_list:
            for found in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
                vars(isa).pop(found, None)
            for method in ("__bool__", "is_avx512_bf16_supported", "is_amx_fp16_supported"):
                clear = getattr(getattr(type(isa), method, None), "cache_clear", None)
                if clear is not None:
                    clear()
        return True

    def _prepare(self) -> None:
        try:
            from torch._inductor import config, cpu_vec_isa
            from torch._inductor.codecache import CppPythonBindingsCodeCache

            trusting: Any = config.patch(self.options())
            with trusting:
                with _quick_tests(cpu_vec_isa) if self.trusted else nullcontext():
                    cpu_vec_isa.valid_vec_isa_list()
                self._known.set()
                CppPythonBindingsCodeCache.load_pybinding_async(["float*"], _KERNEL, submit_fn=_not_now)
        except Exception:
            self.distrust()  # a real fault is found again, and reported, when a piece is compiled
        finally:
            self._known.set()
            self.prepared = True


@contextlib.contextmanager
def _quick_tests(cpu_vec_isa: Any) -> Iterator[None]:
    """Let Inductor's tests of instruction sets ask the compiler for its flags, and nothing else."""
    cls = cpu_vec_isa.VecISA
    _tests.setdefault(cls, cls.check_build)
    cls.check_build = _knows_flags
    try:
        yield
    finally:
        cls.check_build = _tests[cls]


_tests: dict[Any, Any] = {}
"""Inductor's own test of instruction sets."""


def _knows_flags(isa: Any, _code: str) -> bool:
    """Whether the C++ compiler takes an instruction set's flags; stands in for `VecISA.check_build`."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = [get_cpp_compiler(), *shlex.split(isa.build_arch_flags()), "-E", "-x", "c++", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60).returncode == 0


def _not_now(_compile: Any) -> None:
    """Stands in for what would compile a kernel in the background."""


@lru_cache(maxsize=1)
def cpu_toolchain() -> CpuToolchain:
    """The toolchain of this process; the first call begins its preparation and returns at once."""
    return CpuToolchain()


def toolchain_begun() -> bool:
    """Whether this process has begun to prepare its toolchain."""
    return cpu_toolchain.cache_info().currsize > 0


@in_forks
def _begin_anew() -> None:
    """A fork lacks the thread of a toolchain that was still being prepared."""
    if toolchain_begun() and not cpu_toolchain().prepared:
        cpu_toolchain.cache_clear()
        for cls, own in _tests.items():
            cls.check_build = own


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(torch._inductor.config.cpp, "vec_isa_ok")


def why_no_cpp_compiler() -> str | None:
    """Why there is no C++ compiler for Inductor, told without running one; None where there may be."""
    from torch._inductor import config

    asked = config.cpp.cxx
    names = [name for name in (asked if isinstance(asked, (list, tuple)) else [asked]) if name is not None]
    fetched = os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")  # then Inductor gets one by itself
    if sys.platform == "win32" or fetched or any(map(shutil.which, names)):
        return None
    given = os.environ.get("CXX")
    return no_cpp_compiler() if not given else f"CXX={given} is no program that can be run; {no_cpp_compiler()}"


def why_no_folder(device_type: str) -> str | None:
    """Why Inductor can't work in the folder that it compiles in; None when it can."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    try:
        folder = os.path.abspath(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir())
    except OSError as exc:  # no temporary folder can be used
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
