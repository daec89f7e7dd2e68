"""Builds in other processes: a model's program is made there while this process serves the model eagerly or loads its
weights, or from its configuration alone. It goes into the store; whoever serves the model finds it, and compares it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from glowplug.background.job import Job, Outcome, Say
from glowplug.compilation import Compilation
from glowplug.compilers import PieceCompiler, get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import NotServableError, UsageError
from glowplug.front import FrontEnd
from glowplug.frontends.hf.calls import HfCall, Signature
from glowplug.graph.capture import drop_memory
from glowplug.options import Options
from glowplug.reasons import why
from glowplug.report import ElsewhereReport, Report
from glowplug.runtime.forks import Scratch
from glowplug.start import start
from glowplug.store import open_store


def build_for_others(
    front: FrontEnd, options: Options, compiler: PieceCompiler, call: HfCall | str, *, bodies: bool
) -> Compilation:
    """Put the program for a call, and all that it needs, into the store.

    Args:
        front: the model's front end.
        options: as those of the process that will serve it.
        compiler: compiles pieces.
        call: the call, or why there is none.
        bodies: also the op bodies that the serving process would compile beside serving. Without, it is ready sooner.

    Returns:
        What did it. Its report says what was done, or in `fallbacks` why nothing could be. With `ends="auto"`, deferred
        pieces are still being compiled; see `PieceCache.finish`.
    """
    store = open_store(options.cache_dir) if isinstance(compiler, StoringCompiler) else None
    report = Report(compiler=compiler.name)
    compilation = Compilation(front, options, compiler, report, store, for_others=True, bakes_bodies=bodies)
    try:
        found = call if isinstance(call, str) else start(compilation, call)
    except NotServableError:
        raise
    except Exception as exc:  # whatever it is, whoever serves the model can run it eagerly
        found = why(exc)
    if isinstance(found, str):
        report.strategy = "eager"
        report.fall_back(found)
    return compilation


def bake(model: PreTrainedModel, options: Options, *, bodies: bool = True) -> Compilation:
    """The same for the first call of `generate` of a model that `weightless_model` made."""
    from glowplug.frontends.hf.front import HfFrontEnd

    front = HfFrontEnd(model, options)
    return build_for_others(front, options, get_compiler(options.compiler), front.first_call(), bodies=bodies)


def bake_configuration(
    say: Say,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    settings: Mapping[str, Any],
    options: Options,
) -> None:
    """A job: the same for a configuration; `settings` as for `weightless_model`."""
    logging.set_verbosity_error()
    _tell(say, bake(weightless_model(config, dtype=dtype, device=device, **settings), options, bodies=False))


def _tell(say: Say, compilation: Compilation) -> None:
    """Say what came of a build, and finish what is compiled beside."""
    report = compilation.report
    reason = report.fallbacks[-1].reason if report.fallbacks else "no program was made"
    say(None if report.programs else reason, **compilation.facts)
    compilation.pieces.finish()


def can_fork(device: torch.device) -> bool:
    """Whether a build may run in a fork of this process: on Linux without a GPU. Dynamo asks a GPU for the state of its
    random numbers, wherever the model is, and a fork of a process that so much as counted GPUs can't."""
    return sys.platform == "linux" and device.type == "cpu" and not torch.accelerator.is_available()


def begin_baking(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, settings: Mapping[str, Any], options: Options
) -> Job:
    """Begin to build a program from a configuration.

    Args:
        config: the configuration.
        dtype: of the weights.
        device: where they are.
        settings: as for `weightless_model`.
        options: how the model is compiled; with a store.
    """
    options = dataclasses.replace(options, background=False)
    if can_fork(device):
        options = dataclasses.replace(options, compiler=get_compiler(options.compiler))  # a fork has one thread
        return Job.fork(lambda say: bake_configuration(say, config, dtype, device, settings, options))
    if not isinstance(options.compiler, str):
        return Job("a compiler of one's own can't be used in a process of its own")
    options = dataclasses.replace(options, ends="compiled")
    return Job.spawn(bake_configuration, config, dtype, device, settings, options)


def with_store(options: Options) -> tuple[Options, Any]:
    """Options with a store, and what keeps it there: one of this process alone, if there is none."""
    if open_store(options.cache_dir) is not None:
        return options, None
    folder = Scratch("store")
    return dataclasses.replace(options, cache_dir=folder.path), folder


class Builds:
    """The background builds of one model, one for each signature of its calls.

    Args:
        front: the model's front end.
        options: how it is compiled.
        report: receives what happens.

    Attributes:
        options: how it is compiled, with a store.
    """

    def __init__(self, front: FrontEnd, options: Options, report: Report) -> None:
        self.front = front
        options, self._kept = with_store(options)
        self.options = dataclasses.replace(options, background=False)
        self.report = report
        self._met: set[Signature] = set()
        self._begun: dict[Signature, Job] = {}

    def is_first(self, call: HfCall) -> bool:
        """Whether no call like this one was met before: nothing at all is done before the first answer."""
        first = call.signature not in self._met
        self._met.add(call.signature)
        return first

    def began(self, call: HfCall) -> bool:
        """Whether a build was begun for calls like this one."""
        return call.signature in self._known

    @property
    def _known(self) -> Collection[Signature]:
        """Signatures for which a build was begun. A fork of the process that began one finds what it makes in the
        store, or begins another."""
        return {signature for signature, job in self._begun.items() if job.ours}

    def begin(self, call: HfCall) -> None:
        """Begin to build a program for calls like this one, unless that was begun. Called after the call was served,
        which so is not slowed down."""
        if call.signature not in self._known:
            self.report.elsewhere = ElsewhereReport(eager_calls=1)
            self._begun[call.signature] = self._begin(call)

    def _begin(self, call: HfCall) -> Job:
        model: Any = self.front.model
        device = call.inputs.device
        if can_fork(device):
            call = dataclasses.replace(call, cache=None)
            compiler = get_compiler(self.options.compiler)  # made here, as a fork has one thread
            front, options = self.front, self.options

            def build(say: Say) -> None:
                _tell(say, build_for_others(front, options, compiler, call, bodies=False))

            return Job.fork(build, nice=0)  # eager keeps every core busy, and would leave a nice one nothing
        config = model.config
        if auto_class(config)._model_mapping.get(type(config), None) is not type(model):
            return Job(f"no other process can build a {type(model).__name__} from its configuration")
        settings = {"attn_implementation": config._attn_implementation}
        return begin_baking(config, model.dtype, device, settings, self.options)

    def outcome(self, call: HfCall) -> Outcome | None:
        """What became of the build for calls like this one; None while it is under way, or was not begun."""
        if call.signature not in self._known:
            return None
        outcome = self._begun[call.signature].outcome()
        told = self.report.elsewhere
        if told is not None and outcome is None:
            told.eager_calls += 1
        elif told is not None and outcome is not None:
            told.seconds, told.reason = outcome.seconds, outcome.reason
        return outcome

    def wait(self, deadline: float) -> None:
        """Until the builds that were begun have ended, or the deadline (`time.monotonic()`) is over."""
        for job in self._begun.values():
            job.outcome(deadline)


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads a model that writes text."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image_text = config.model_type not in known and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if image_text else AutoModelForCausalLM


def weightless_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, **settings: Any
) -> PreTrainedModel:
    """The model of a configuration, in eval mode, its weights without memory: it can be traced and not run.

    Args:
        config: its configuration.
        dtype: of its weights.
        device: where its weights would be.
        settings: as for `from_config`, such as `attn_implementation`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, **settings)
    drop_memory(model, device)
    return model.eval()


def read_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that `from_pretrained` gives a folder's model: the configuration's, or else its first weights'.

    Raises:
        UsageError: neither says.
    """
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if isinstance(found, torch.dtype):
        return found
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(Exception), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                dtype = weights.get_slice(name).get_dtype()
                if dtype in _DTYPES:
                    return _DTYPES[dtype]
    raise UsageError(f"neither {folder}/config.json nor weights say which dtype the model has; give a dtype")


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a local folder.

    Raises:
        UsageError: there is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # errors of many classes
        text = " ".join(str(exc).split())[:300]
        raise UsageError(f"{folder}/config.json is not a configuration that transformers knows: {text}") from exc
