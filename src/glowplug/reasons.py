"""Turns exceptions of torch's tracer and compilers, of the system and of models into one sentence for a person.

Leaves out what their messages tell developers. Relies on the names of torch's exceptions and the form of their messages
(private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import errno
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from traceback import FrameSummary

import torch

from glowplug import errors
from glowplug.errors import GlowplugError

_LONGEST = 300
_NOISE = re.compile(
    r"^(Explanation|Hint|Developer debug context|For more details|from user code|Set TORCH|You can suppress|"
    r"The above exception|During handling|Traceback|File \"|import torch\._dynamo|torch\._dynamo\.config|"
    r"The graph break occurred|Graph Break Reason|User code traceback|target:|args\[\d+\]:|kwargs:|Found from|"
    r"[\^~ ]+$)"
)


def why(exc: BaseException) -> str:
    """The reason in an exception, as one sentence without its full stop.

    Example:
        >>> why(FileNotFoundError(2, "No such file or directory", "/tmp/x"))
        '/tmp/x: No such file or directory'
    """
    exc = _cause(exc)
    if isinstance(exc, GlowplugError):
        return str(exc)
    if isinstance(exc, OSError):
        return _system(exc)
    names = {cls.__name__ for cls in type(exc).__mro__}
    if "InvalidCxxCompiler" in names:
        return no_cpp_compiler()
    if "CppCompileError" in names:
        return _cpp(str(getattr(exc, "output", "")) or str(exc))
    if names & {"TorchDynamoException", "GuardOnDataDependentSymNode"} or raised_by_tracer(exc):
        return _untraceable(exc)
    return said(exc)


def said(exc: BaseException) -> str:
    """The class of an exception and the first line of its message that is meant for people."""
    text = plain(str(exc))
    return f"{type(exc).__name__}: {text}" if text else f"{type(exc).__name__}, without a message"


def plain(text: str) -> str:
    """The first line of a text that is meant for people, without addresses of objects and folders of files."""
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line and not _NOISE.match(line)), "")
    line = re.sub(r"^Unsupported\b:? ?", "not supported: ", line)
    line = one_line(line).rstrip(" :.")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST].rpartition(' ')[0]} ..."


def counted(number: int, what: str) -> str:
    """A number of things: `1 piece`, `2 pieces`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """A text on one line, with objects replaced by their names or types, without addresses."""
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


_REPLACEMENTS = (
    (re.compile(r"<(?:class|module|enum) '([\w.]+)'[^<>]*>"), r"\1"),
    (re.compile(r"<(?:function|bound method|built-in (?:function|method)|method) ([\w.]+)(?:[^<>]|<[^<>]*>)*>"), r"\1"),
    (re.compile(r"<([\w.]+)(?: object| instance)? at 0x[0-9a-fA-F]+>"), r"\1"),
    (re.compile(r"<([\w.]+)[^<>]* 0x[0-9a-fA-F]+[^<>]*>"), r"\1"),
    (re.compile(r"\bFakeTensor\([^()]*(?:\([^()]*\)[^()]*)*\)"), "a tensor"),
    (re.compile(r"\b\w+Variable\([^()]*\)"), "a value"),
    (re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}\b"), ""),
    (re.compile(r"(?:/[\w.+-]+)+/([\w.+-]+\.py)\b"), r"\1"),
)


def describe_break(text: str, stack: Iterable[FrameSummary] = ()) -> str:
    """What code does that Dynamo can't trace, and where, from Dynamo's message and the frames of the code."""
    headline, debug = _parts(text)
    what = _cause_of_break(headline, debug, text) or "does something that a trace cannot follow"
    return f"{_place(_frames(stack)) or 'the code'} {what}"


def raised_by_tracer(exc: BaseException) -> bool:
    """Whether the tracer itself raised an exception, whose message then names the code."""
    return "from user code:" in str(exc)


def no_cpp_compiler() -> str:
    """The sentence for a missing C++ compiler."""
    return "there is no C++ compiler, which Inductor needs; install g++ or clang, or set CXX to the one that you have"


def no_folder(path: str, why_not: str) -> str:
    """The sentence for a folder that Inductor can't use."""
    return f"Inductor can't use its folder {path}: {why_not}; set TORCHINDUCTOR_CACHE_DIR or TMPDIR to another"


def _cause(exc: BaseException) -> BaseException:
    """The exception behind a compiler's or Dynamo's exception; an error of glowplug's own if there is one."""
    link: BaseException | None = exc
    for _ in range(20):
        if link is None:
            break
        if isinstance(link, GlowplugError):
            return link
        link = getattr(link, "inner_exception", None) or link.__cause__
    while isinstance(inner := getattr(exc, "inner_exception", None), BaseException):
        exc = inner
    return exc


def _system(exc: OSError) -> str:
    text = exc.strerror or plain(str(exc)) or type(exc).__name__
    if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        what = f" {exc.filename}" if exc.filename else ""
        return f"there is no room left to write{what}: {text}; free some, or set TMPDIR"
    return f"{exc.filename}: {text}" if exc.filename else text


def _cpp(output: str) -> str:
    """The reason in a C++ compiler's output."""
    missing = re.search(r"fatal error: '?([\w./+-]+)'?(?: file not found|: No such file)", output)
    if missing is not None and missing[1].startswith("Python.h"):
        return "the C++ compiler finds no Python.h; install the headers of this Python (python3-dev)"
    if missing is not None:
        return f"the C++ compiler finds no {missing[1]}; install what brings it"
    if "No space left" in output:
        return "there is no room left for the C++ compiler's files; free some, or set TMPDIR"
    lines = [line.strip() for line in output.splitlines()]
    complaint = next((line for line in lines if re.search(r"\berror\b|not found|cannot|can't", line)), "")
    return f"the C++ compiler failed: {plain(complaint) or 'it does not say why'}"


def _untraceable(exc: BaseException) -> str:
    """What the model does that a trace can't follow, and where."""
    text = str(exc)
    headline, debug = _parts(text)
    frames = _frames(getattr(exc, "real_stack", None) or ())
    if not frames:
        tail = text.partition("from user code")[2]
        frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', tail)]
    place = _place(frames)
    raised = re.search(r"raised exception (\w+)\((.*)\)", debug) if headline.startswith("Observed exception") else None
    if raised is not None:
        message = raised[2].strip("'\"")
        if issubclass(getattr(errors, raised[1], Exception), GlowplugError):
            return message
        detail = f": {plain(raised[2])}" if message else ""
        return f"traced, the model raised {raised[1]}{detail}{f', at {place}' if place else ''}"
    what = _cause_of_break(headline, debug, text)
    if what is None and place is None:
        return f"torch.compile can't trace the model, for a reason of its own ({type(exc).__name__})"
    return f"{place or 'the model'} {what or 'does something that a trace cannot follow'}"


def _parts(text: str) -> tuple[str, str]:
    """The first line of Dynamo's message, which names the sort of graph break, and its context for developers."""
    debug = re.search(r"Developer debug context: (.*)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "", debug[1].strip() if debug is not None else ""


def _cause_of_break(headline: str, debug: str, text: str) -> str | None:
    """What the code does, for the graph breaks that are known."""
    for pattern, sentence in _KNOWN:
        if re.search(pattern, headline):
            return sentence
    failed = re.search(r"got (\w+)\((.*)\)\s*$", text, re.MULTILINE)
    if failed is not None and ("ake tensor" in text or "FX node" in text):
        return f"fails when it is traced: {failed[1]}: {plain(failed[2].strip(chr(39) + chr(34)))}"
    function = _called(headline, debug)
    return f"calls {function}, which a trace cannot follow" if function else None


_KNOWN = (
    (
        r"[Dd]ata.[Dd]ependent|Tensor\.item\(\)|guard_scalar|tolist\(\)|non-scalar tensor|Dynamic slicing|generic_jump",
        "asks for the values of a tensor, which a trace does not have",
    ),
    (r"Dynamic shape operator", "makes a tensor whose size depends on the values of another"),
    (r"Length mismatch when unpacking", "unpacks something of another length"),
    (r"graph_break\(\)", "asks for a break in the trace by torch._dynamo.graph_break()"),
    (r"recompile limit", "was traced too often, each time for other arguments"),
    (r"RNN, GRU, or LSTM", "runs an RNN, GRU or LSTM, which torch.compile does not trace"),
    (r"torch\.jit|TorchScript|ScriptModules?\b", "runs a torch.jit script, which torch.compile does not trace"),
    (r"[Ss]parse", "uses a sparse tensor, which torch.compile does not trace"),
    (r"numpy|ndarray", "uses NumPy in a way that torch.compile does not trace"),
    (r"context manager|GenericContextWrapping", "enters a context manager that a trace cannot follow"),
    (r"logging\.Logger|debugging function", "writes to a log"),
    (r"Import failure|Bad import", "imports something that can't be imported"),
    (r"[Hh]igher.?order|^HOP", "uses an operator of torch.compile's own in a way that it does not trace"),
    (r"backward\(|autograd|grad_fn|requires_grad", "computes gradients, or asks for them"),
    (
        r"[Gg]enerator (method|random)|random\.Random|Tensor\.random_",
        "draws random numbers in a way that no trace can follow",
    ),
)


def _called(headline: str, debug: str) -> str | None:
    """Dynamo's name of the function that the code calls and that can't be traced."""
    calls = r"marked as skipped|torch\.compiler\.disable|builtin operator|function call|method call|inline"
    if not re.search(calls, headline):
        return None
    module = re.search(r"module: ([\w.]+)", debug)
    for pattern in (r"qualname: ([\w.]+)", r"builtin (\w+)", r"<(?:bound method|function|built-in \w+) ([\w.]+)"):
        match = re.search(pattern, debug)
        if match is not None:
            owner = f"{module[1]}." if module is not None and module[1] not in ("None", "builtins") else ""
            return f"{owner}{match[1].removeprefix('<locals>.')}"
    return None


def _place(frames: Sequence[tuple[str, int]]) -> str | None:
    """The innermost line of code outside torch, Python and glowplug, as `file.py:line`."""
    own = [frame for frame in frames if not _is_library(frame[0])]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else None


def _is_library(file: str) -> bool:
    packages = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
    in_python = file.startswith(sysconfig.get_paths()["stdlib"] + os.sep) and "site-packages" not in file
    return file.startswith((*packages, "<")) or in_python


def _frames(stack: Iterable[FrameSummary]) -> list[tuple[str, int]]:
    return [(frame.filename, frame.lineno or 0) for frame in stack]


def switched_off() -> str | None:
    """Which setting makes torch.compile call functions instead of tracing them; None if none does."""
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name) == "1":
            return f"{name}=1 is set, which turns torch.compile off; unset it to compile"
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and getattr(config, "disable", False):
        return "torch._dynamo.config.disable is True, which turns torch.compile off; set it to False to compile"
    frame = sys.modules.get("torch._dynamo.eval_frame")
    if getattr(getattr(frame, "_stance", None), "stance", None) == "force_eager":
        return 'torch.compiler.set_stance("force_eager") turns torch.compile off; set the stance "default" to compile'
    return None
