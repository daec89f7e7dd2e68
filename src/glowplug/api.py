"""`glowplug.compile` and `glowplug.report`."""

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
) -> M:
    """Make a model start fast and run compiled: each distinct piece is compiled once, at the first call.

    A transformers causal language model keeps its whole interface: `model(...)`, `model.generate(...)`, any cache.
    A PEFT model is compiled with its adapters; compile it anew after attaching, switching or merging them.
    Any other `nn.Module` whose forward takes and returns tensors works as well. What the compiled program can't serve
    runs eager, with the reason in `glowplug.report(model)`.

    Args:
        model: the model, in eval mode. The same object is returned. Compiling it again starts afresh.
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
        background: answer at once, in eager, while another process builds the program; see `Options`.

    Returns:
        `model` itself.

    Raises:
        UsageError: a wrong option, or `model` is not an `nn.Module`.
        LayerOrderError: (at a call) `identity="ordered"` can't serve this model safely.
        NotServableError: (at a call) with `strict=True`.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained("models/tiny-gpt-oss")
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
    )
    if not isinstance(model, nn.Module):
        raise UsageError(f"glowplug.compile takes an nn.Module, not a {type(model).__name__}")
    served = adapted(model)
    if is_causal_lm(served):
        from glowplug.frontends.hf.front import HfFrontEnd

        attach(HfFrontEnd, served, options)
    elif background:
        raise UsageError("background=True is for causal language models of transformers")
    else:
        from glowplug.frontends.plain.front import PlainFrontEnd

        attach(PlainFrontEnd, model, options)
    return model


def from_pretrained(path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a causal language model and compile it meanwhile: another process traces and compiles from the
    configuration while the weights load in this one, and readiness takes as long as the longer of the two.

    Args:
        path: a local folder, or whatever transformers' `from_pretrained` takes.
        kwargs: options of `glowplug.compile`; everything else goes to transformers' `from_pretrained`.

    Returns:
        The model, in eval mode, its program ready. `glowplug.report(model).elsewhere` says what was hidden.

    Raises:
        UsageError: a wrong option, or no configuration at `path`.
        OSError, ValueError: transformers' own, from loading.

    Example:
        >>> model = glowplug.from_pretrained("models/tiny-gpt-oss")
    """
    from glowplug.frontends.hf.loading import load

    names = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{name: value for name, value in kwargs.items() if name in names})
    return load(path, options, {name: value for name, value in kwargs.items() if name not in names})


def report(model: nn.Module) -> Report:
    """What glowplug did to a compiled model so far.

    Raises:
        UsageError: the model was not compiled by `glowplug.compile`.
    """
    engine = engine_of(adapted(model))
    if engine is None:
        raise UsageError("this model was not compiled by glowplug; call glowplug.compile(model) first")
    return engine.report


def settle(model: nn.Module, timeout_s: float = 120.0) -> None:
    """Wait for what is compiled beside serving (see `Options.inside` and `Options.ends`), and put it to use. For
    measurements.

    Args:
        model: a compiled model; where nothing is under way, returns at once.
        timeout_s: seconds to wait at most.
    """
    engine = engine_of(adapted(model))
    if engine is not None:
        engine.settle(timeout_s)


def adapted(model: nn.Module) -> nn.Module:
    """Of a PEFT model, the causal language model that holds its adapters: its forward is the one that every call ends
    in, `generate` too. Any other model: itself."""
    base: Any = getattr(model, "get_base_model", None)
    found = base() if callable(base) and type(model).__module__.startswith("peft.") else model
    return found if isinstance(found, nn.Module) and is_causal_lm(found) else model


def is_causal_lm(model: nn.Module) -> bool:
    """Whether transformers can generate text with the model, without importing transformers for models of others."""
    if not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        return False
    from transformers import GenerationMixin, PreTrainedModel

    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)
