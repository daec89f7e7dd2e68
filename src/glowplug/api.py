"""`glowplug.compile`, `from_pretrained`, `report` and `settle`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

from torch import nn

from glowplug.compilers import PieceCompiler
from glowplug.engine import attach, engine_of
from glowplug.errors import UsageError
from glowplug.options import Options
from glowplug.report import Report

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    *,
    identity: str = "auto",
    experts: str = "auto",
    compiler: str | PieceCompiler = "inductor",
    fast_moe_cold_start: bool | None = None,
    strict: bool = False,
    verify: str = "once",
    stamp: str = "auto",
    inside: str = "auto",
    ends: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
    background: bool = False,
    cuda_graphs: str = "auto",
) -> M:
    """Make a model start fast and run compiled: each distinct piece is compiled once, at the first call.

    A transformers causal language model keeps its whole interface: `model(...)`, `model.generate(...)`, any cache.
    A PEFT model is compiled with its adapters; compile it again after attaching, switching or merging them.
    Any other `nn.Module` whose forward takes and returns tensors works as well. A call that the compiled program can't
    serve runs eager, with the reason in `glowplug.report(model)`.

    Args:
        model: the model, in eval mode. Compiling it again starts afresh.
        identity: `"auto"`, `"hoisted"`, `"ordered"` or `"baked"`; see `Options`.
        experts: `"auto"`, `"inline"` or `"opaque"`; see `Options`.
        compiler: `"inductor"`, `"eager"` or a `PieceCompiler`.
        fast_moe_cold_start: None, True or False; see `Options`.
        strict: raise instead of running eager.
        verify: `"once"` or `"off"`; see `Options`.
        stamp: `"auto"` or `"off"`; see `Options`.
        inside: `"auto"`, `"compiled"` or `"eager"`; see `Options`.
        ends: `"auto"` or `"compiled"`; see `Options`.
        cache_dir: the artifact store, a folder, a URL or `"off"`; see `Options`.
        background: run eager at first while another process builds the program; see `Options`.
        cuda_graphs: `"auto"` or `"off"`; see `Options`.

    Returns:
        `model` itself.

    Raises:
        UsageError: an option is wrong, or `model` is not an `nn.Module`.
        LayerOrderError: (at a call) `identity="ordered"` can't serve this model safely.
        NotServableError: (at a call) with `strict=True`.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(find_checkpoint("tiny-gpt-oss"))
        >>> glowplug.compile(model).generate(**tokenizer("The with statement", return_tensors="pt"))
    """
    options = Options(
        identity=identity,  # type: ignore[arg-type]
        experts=experts,  # type: ignore[arg-type]
        compiler=compiler,
        fast_moe_cold_start=fast_moe_cold_start,
        strict=strict,
        verify=verify,  # type: ignore[arg-type]
        stamp=stamp,  # type: ignore[arg-type]
        inside=inside,  # type: ignore[arg-type]
        ends=ends,  # type: ignore[arg-type]
        cache_dir=cache_dir,
        background=background,
        cuda_graphs=cuda_graphs,  # type: ignore[arg-type]
    )
    if not isinstance(model, nn.Module):
        raise UsageError(f"glowplug.compile takes an nn.Module, not a {type(model).__name__}")
    language_model = _without_peft(model)
    if is_causal_lm(language_model):
        from glowplug.frontends.hf.front import HfFrontEnd

        attach(HfFrontEnd, language_model, options)
    elif background:
        raise UsageError("background=True is for causal language models of transformers")
    else:
        from glowplug.frontends.plain.front import PlainFrontEnd

        attach(PlainFrontEnd, model, options)
    return model


def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a causal language model and compile it while the weights load.

    Another process traces and compiles the model from its configuration while this one loads the weights, so the model
    is ready when the slower of the two has finished.

    Args:
        path: a local folder, or anything else that transformers' `from_pretrained` takes.
        kwargs: options of `glowplug.compile`; all others go to transformers' `from_pretrained`.

    Returns:
        The model, in eval mode, with its program ready. `glowplug.report(model).elsewhere` has the times.

    Raises:
        UsageError: an option is wrong, or there is no configuration at `path`.
        OSError, ValueError: raised by transformers while it loads the model.

    Example:
        >>> model = glowplug.from_pretrained(find_checkpoint("tiny-gpt-oss"))
    """
    from glowplug.frontends.hf.loading import load

    names = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{name: value for name, value in kwargs.items() if name in names})
    return load(path, options, {name: value for name, value in kwargs.items() if name not in names})


def report(model: nn.Module) -> Report:
    """The report of what glowplug has done to a model so far.

    Raises:
        UsageError: the model was not compiled by `glowplug.compile`.
    """
    engine = engine_of(_without_peft(model))
    if engine is None:
        raise UsageError("this model was not compiled by glowplug; call glowplug.compile(model) first")
    return engine.report


def settle(model: nn.Module, timeout_s: float = 120.0) -> None:
    """Wait until deferred pieces and op bodies are compiled (see `Options.ends` and `Options.inside`), and use them.

    Meant for measurements. Returns at once if nothing is being compiled.

    Args:
        model: a compiled model.
        timeout_s: the most seconds to wait.
    """
    engine = engine_of(_without_peft(model))
    if engine is not None:
        engine.settle(timeout_s)


def _without_peft(model: nn.Module) -> nn.Module:
    """The causal language model inside a PEFT model, which all its calls reach in the end; any other model itself."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    base = get_base_model() if callable(get_base_model) and type(model).__module__.startswith("peft.") else model
    return base if isinstance(base, nn.Module) and is_causal_lm(base) else model


def is_causal_lm(model: nn.Module) -> bool:
    """Whether transformers can generate text with the model; imports transformers only for its own classes."""
    if not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        return False
    from transformers import GenerationMixin, PreTrainedModel

    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
