"""Why something could not be done, in one sentence for a person: what is made of the exceptions of torch's tracer and
compilers, of the system and of models. What they say to their developers is left out.

Goes by the names of torch's exceptions and the form of their messages (private; checked on torch 2.11 and 2.13).
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
    """What an exception says, as one sentence without its stop.

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
    if names & {"TorchDynamoException", "GuardOnDataDependentSymNode"} or is_tracers(exc):
        return _untraceable(exc)
    return said(exc)


def said(exc: BaseException) -> str:
    """The class of an exception and the first thing that it says to people."""
    text = plain(str(exc))
    return f"{type(exc).__name__}: {text}" if text else f"{type(exc).__name__}, without a message"


def plain(text: str) -> str:
    """The first line of a text that says something to people: without objects' addresses, and files by their names."""
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line and not _NOISE.match(line)), "")
    line = re.sub(r"^Unsupported\b:? ?", "not supported: ", line)
    line = one_line(line).rstrip(" :.")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST].rpartition(' ')[0]} ..."


def one_line(text: str) -> str:
    """A text in one line, objects by the names of what they are, without addresses."""
    for pattern, stands in _STANDS:
        text = pattern.sub(stands, text)
    return " ".join(text.split())


_STANDS = (
    (re.compile(r"<(?:class|module|enum) '([\w.]+)'[^<>]*>"), r"\1"),
    (re.compile(r"<(?:function|bound method|built-in (?:function|method)|method) ([\w.]+)(?:[^<>]|<[^<>]*>)*>"), r"\1"),
    (re.compile(r"<([\w.]+)(?: object| instance)? at 0x[0-9a-fA-F]+>"), r"\1"),
    (re.compile(r"<([\w.]+)[^<>]* 0x[0-9a-fA-F]+[^<>]*>"), r"\1"),
    (re.compile(r"\bFakeTensor\([^()]*(?:\([^()]*\)[^()]*)*\)"), "a tensor"),
    (re.compile(r"\b\w+Variable\([^()]*\)"), "a value"),
    (re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}\b"), ""),
    (re.compile(r"(?:/[\w.+-]+)+/([\w.+-]+\.py)\b"), r"\1"),
)


def told(text: str, stack: Iterable[FrameSummary] = ()) -> str:
    """What a message of Dynamo's says that code does, and where.

    Args:
        text: the message.
        stack: the frames of the code that it is about.
    """
    kind, debug = _parts(text)
    what = _told(kind, debug, text) or "does something that a trace can not follow"
    return f"{_place(_frames(stack)) or 'the code'} {what}"


def is_tracers(exc: BaseException) -> bool:
    """Whether an exception is the tracer's own, which says by itself what code it was about."""
    return "from user code:" in str(exc)


def named(source: str) -> str:
    """A source of Dynamo's as people name what lies there.

    Example:
        >>> named("L['model']._modules['layers']._modules['0']._parameters['weight']")
        'model.layers.0.weight'
    """
    parts = re.sub(r"^[LG]\['__import_|^[LG]\['", "", source)
    parts = re.sub(r"\._(?:modules|parameters|buffers)\['|\['", ".", parts)
    return parts.replace("']", "").replace("_dot_", ".").strip(".")


def no_cpp_compiler() -> str:
    """That there is no C++ compiler, and what to do."""
    return "there is no C++ compiler, which Inductor needs; install g++ or clang, or set CXX to the one that you have"


def no_folder(path: str, why_not: str) -> str:
    """That Inductor can't work in its folder, and what to do."""
    return f"Inductor can't use its folder {path}: {why_not}; set TORCHINDUCTOR_CACHE_DIR or TMPDIR to another"


def _cause(exc: BaseException) -> BaseException:
    """What a compiler's or Dynamo's exception was raised for; an error of glowplug's own, if there is one."""
    at: BaseException | None = exc
    for _ in range(20):
        if at is None:
            break
        if isinstance(at, GlowplugError):
            return at
        at = getattr(at, "inner_exception", None) or at.__cause__
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
    """What a C++ compiler complained of."""
    missing = re.search(r"fatal error: '?([\w./+-]+)'?(?: file not found|: No such file)", output)
    if missing is not None and missing[1].startswith("Python.h"):
        return "the C++ compiler finds no Python.h; install the headers of this Python (python3-dev)"
    if missing is not None:
        return f"the C++ compiler finds no {missing[1]}; install what brings it"
    if "No space left" in output:
        return "there is no room left for the C++ compiler's files; free some, or set TMPDIR"
    lines = [line.strip() for line in output.splitlines()]
    found = next((line for line in lines if re.search(r"\berror\b|not found|cannot|can't", line)), "")
    return f"the C++ compiler failed: {plain(found) or 'it does not say why'}"


def _untraceable(exc: BaseException) -> str:
    """What the model does that a trace can't follow, and where."""
    text = str(exc)
    kind, debug = _parts(text)
    frames = _frames(getattr(exc, "real_stack", None) or ())
    if not frames:
        tail = text.partition("from user code")[2]
        frames = [(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', tail)]
    place = _place(frames)
    raised = re.search(r"raised exception (\w+)\((.*)\)", debug) if kind.startswith("Observed exception") else None
    if raised is not None:
        message = raised[2].strip("'\"")
        if issubclass(getattr(errors, raised[1], Exception), GlowplugError):
            return message
        said_so = f": {plain(raised[2])}" if message else ""
        return f"traced, the model raised {raised[1]}{said_so}{f', at {place}' if place else ''}"
    what = _told(kind, debug, text)
    if what is None and place is None:
        return f"torch.compile can't trace the model, for a reason of its own ({type(exc).__name__})"
    return f"{place or 'the model'} {what or 'does something that a trace can not follow'}"


def _parts(text: str) -> tuple[str, str]:
    """The first line of a message of Dynamo's, which names a kind of reason, and what it tells developers."""
    debug = re.search(r"Developer debug context: (.*)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "", debug[1].strip() if debug is not None else ""


def _told(kind: str, debug: str, text: str) -> str | None:
    """What code does, for reasons of Dynamo's that are known."""
    for pattern, sentence in _KNOWN:
        if re.search(pattern, kind):
            return sentence
    failed = re.search(r"got (\w+)\((.*)\)\s*$", text, re.MULTILINE)
    if failed is not None and ("ake tensor" in text or "FX node" in text):
        return f"fails when it is traced: {failed[1]}: {plain(failed[2].strip(chr(39) + chr(34)))}"
    called = _called(kind, debug)
    return f"calls {called}, which a trace can not follow" if called else None


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
    (r"context manager|GenericContextWrapping", "enters a context manager that a trace can not follow"),
    (r"logging\.Logger|debugging function", "writes to a log"),
    (r"Import failure|Bad import", "imports something that can't be imported"),
    (r"[Hh]igher.?order|^HOP", "uses an operator of torch.compile's own in a way that it does not trace"),
    (r"backward\(|autograd|grad_fn|requires_grad", "computes gradients, or asks for them"),
    (
        r"[Gg]enerator (method|random)|random\.Random|Tensor\.random_",
        "draws random numbers in a way that no trace can follow",
    ),
)


def _called(kind: str, debug: str) -> str | None:
    """The function that code calls and that can't be traced, as Dynamo names it."""
    if not re.search(
        r"marked as skipped|torch\.compiler\.disable|builtin operator|function call|method call|inline", kind
    ):
        return None
    module = re.search(r"module: ([\w.]+)", debug)
    for pattern in (r"qualname: ([\w.]+)", r"builtin (\w+)", r"<(?:bound method|function|built-in \w+) ([\w.]+)"):
        found = re.search(pattern, debug)
        if found is not None:
            owner = f"{module[1]}." if module is not None and module[1] not in ("None", "builtins") else ""
            return f"{owner}{found[1].removeprefix('<locals>.')}"
    return None


def _place(frames: Sequence[tuple[str, int]]) -> str | None:
    """The innermost line of code that is not of torch, Python or glowplug, as `file.py:line`."""
    own = [frame for frame in frames if not _is_librarys(frame[0])]
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else None


def _is_librarys(file: str) -> bool:
    packages = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
    in_python = file.startswith(sysconfig.get_paths()["stdlib"] + os.sep) and "site-packages" not in file
    return file.startswith((*packages, "<")) or in_python


def _frames(stack: Iterable[FrameSummary]) -> list[tuple[str, int]]:
    return [(frame.filename, frame.lineno or 0) for frame in stack]


def switched_off() -> str | None:
    """Why torch.compile traces nothing at all in this process now; None when it does.

    With these it calls a function instead of tracing it.
    """
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
