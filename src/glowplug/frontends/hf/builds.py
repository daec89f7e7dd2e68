"""Background builds: another process makes a model's program while this one runs the model eagerly or loads its
weights. A program can also be made from a configuration alone. The serving process finds it in the store and checks it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
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
from glowplug.compilers import InductorCompiler, PieceCompiler, get_compiler
from glowplug.compilers.base import StoringCompiler
from glowplug.errors import NotServableError, UsageError
from glowplug.front import FrontEnd
from glowplug.frontends.hf.calls import HfCall, Signature
from glowplug.graph.capture import TensorsWithoutMemory, drop_memory, in_mode_of, weightless
from glowplug.options import Options
from glowplug.reasons import why
from glowplug.report import ElsewhereReport, Report
from glowplug.runtime.forks import Scratch
from glowplug.start import start
from glowplug.store import open_store


def build_for_others(
    front: FrontEnd, options: Options, compiler: PieceCompiler, call: HfCall | str, *, bodies: bool
) -> Compilation:
    """Put the program for a call, and everything it needs, into the store.

    Args:
        front: the model's front end.
        options: the options of the serving process.
        compiler: compiles pieces.
        call: the call, or the reason why there is none.
        bodies: also compile the op bodies that the serving process would otherwise compile in the background. The
            program is ready sooner without them.

    Returns:
        The compilation. Its report says what was done, or in `fallbacks` why nothing could be. With `ends="auto"`, it
        may still be compiling deferred pieces; see `PieceCache.finish`.
    """
    store = open_store(options.cache_dir) if isinstance(compiler, StoringCompiler) else None
    report = Report(compiler=compiler.name)
    compilation = Compilation(front, options, compiler, report, store, for_others=True, bakes_bodies=bodies)
    try:
        result = call if isinstance(call, str) else start(compilation, call)
    except NotServableError:
        raise
    except Exception as exc:  # the serving process can still run the model eagerly
        result = why(exc)
    if isinstance(result, str):
        report.strategy = "eager"
        report.fall_back(result)
    return compilation


def bake(model: PreTrainedModel, options: Options, *, bodies: bool = True) -> Compilation:
    """`build_for_others` for the first call that `generate` makes; for a model of `weightless_model`."""
    from glowplug.frontends.hf.front import HfFrontEnd

    front = HfFrontEnd(model, options)
    with TensorsWithoutMemory() if weightless(model) else contextlib.nullcontext():
        call = front.first_call()
    return build_for_others(front, options, get_compiler(options.compiler), call, bodies=bodies)


@dataclass(frozen=True)
class _Recipe:
    """How a job builds a program from a configuration, see `weightless_model`."""

    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    settings: Mapping[str, Any]
    options: Options

    def bake(self, **options: Any) -> Compilation:
        """`bake`, with some options of its own."""
        logging.set_verbosity_error()
        model = weightless_model(self.config, dtype=self.dtype, device=self.device, **self.settings)
        # A fork has no GPU for the tensors of the call.
        with in_mode_of(next(model.parameters())) if self.device.type == "cuda" else contextlib.nullcontext():
            return bake(model, dataclasses.replace(self.options, **options), bodies=False)


def _bake_anew(say: Say, recipe: _Recipe) -> None:
    """The work of a job that is a new process."""
    _finish(say, recipe.bake(ends="compiled"))


def _bake_in_fork(say: Say, recipe: _Recipe, compiler: PieceCompiler) -> None:
    """The work of a job that is a fork. If it fails for a GPU, whose driver it can't call, a new process does it."""
    if isinstance(compiler, InductorCompiler):
        compiler.stand_in()
    compilation = recipe.bake(compiler=compiler)
    by_name = isinstance(recipe.options.compiler, str)
    if compilation.report.programs or recipe.device.type == "cpu" or not by_name:
        _finish(say, compilation)
        return
    outcome = Job.spawn(_bake_anew, recipe).outcome(math.inf)
    assert outcome is not None
    say(outcome.reason, **outcome.facts)


def _finish(say: Say, compilation: Compilation) -> None:
    """Report the outcome of a build, then finish the deferred pieces."""
    report = compilation.report
    reason = report.fallbacks[-1].reason if report.fallbacks else "no program was made"
    say(None if report.programs else reason, **compilation.facts)
    compilation.pieces.finish()


def _can_fork(compiler: PieceCompiler, device: torch.device) -> bool:
    """Whether a fork of this process can build: on Linux without a GPU, or for a GPU if the compiler stands in for it.
    Dynamo reads the state of a GPU's random generator even if the model is on the CPU, and that fails in a fork of a
    process that has merely counted its GPUs.
    """
    if device.type == "cuda":
        return isinstance(compiler, InductorCompiler) and compiler.may_bake(device)
    return sys.platform == "linux" and device.type == "cpu" and not torch.accelerator.is_available()


def begin_baking(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, settings: Mapping[str, Any], options: Options
) -> Job:
    """Begin to build a program from a configuration, see `weightless_model`; `options` name a store."""
    recipe = _Recipe(config, dtype, device, settings, dataclasses.replace(options, background=False))
    compiler = get_compiler(options.compiler)  # before a fork, which has only one thread
    if _can_fork(compiler, device):
        return Job.fork(lambda say: _bake_in_fork(say, recipe, compiler))
    if not isinstance(options.compiler, str):
        return Job("a compiler of one's own can't be used in a process of its own")
    return Job.spawn(_bake_anew, recipe)


def with_store(options: Options) -> tuple[Options, Scratch | None]:
    """Options that name a store. If there is none, it is a private folder, which lives as long as the second value."""
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
        options, self._scratch = with_store(options)
        self.options = dataclasses.replace(options, background=False)
        self.report = report
        self._seen: set[Signature] = set()
        self._jobs: dict[Signature, Job] = {}

    def is_first(self, call: HfCall) -> bool:
        """Whether this is the first call of its signature. No work is done before the first answer."""
        first = call.signature not in self._seen
        self._seen.add(call.signature)
        return first

    def began(self, call: HfCall) -> bool:
        """Whether this process began a build for such calls. A fork of it finds that program in the store, or begins a
        build of its own."""
        job = self._jobs.get(call.signature)
        return job is not None and job.ours

    def begin(self, call: HfCall) -> None:
        """Begin to build a program for such calls, unless that was done. Comes after the call was answered, so that the
        call is not delayed."""
        if not self.began(call):
            self.report.elsewhere = ElsewhereReport(eager_calls=1)
            self._jobs[call.signature] = self._begin(call)

    def _begin(self, call: HfCall) -> Job:
        model: Any = self.front.model
        device = call.inputs.device
        compiler = get_compiler(self.options.compiler)  # before the fork, which has only one thread
        if device.type == "cpu" and _can_fork(compiler, device):
            call = dataclasses.replace(call, cache=None)
            front, options = self.front, self.options

            def build(say: Say) -> None:
                _finish(say, build_for_others(front, options, compiler, call, bodies=False))

            # Eager calls keep every core busy: at a lower priority the build would get no time.
            return Job.fork(build, nice=0)
        config = model.config
        if auto_class(config)._model_mapping.get(type(config), None) is not type(model):
            return Job(f"no other process can build a {type(model).__name__} from its configuration")
        settings = {"attn_implementation": config._attn_implementation}
        return begin_baking(config, model.dtype, device, settings, self.options)

    def outcome(self, call: HfCall) -> Outcome | None:
        """The outcome of the build for such calls; None if it still runs or was not begun."""
        if not self.began(call):
            return None
        outcome, elsewhere = self._jobs[call.signature].outcome(), self.report.elsewhere
        if elsewhere is not None and outcome is None:
            elsewhere.eager_calls += 1
        elif elsewhere is not None and outcome is not None:
            elsewhere.seconds, elsewhere.reason = outcome.seconds, outcome.reason
        return outcome

    def wait(self, deadline: float) -> None:
        """Wait until all builds have ended, or until the deadline (`time.monotonic()`)."""
        for job in self._jobs.values():
            job.outcome(deadline)


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads a configuration's text-generating model."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    image_text = config.model_type not in known and config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if image_text else AutoModelForCausalLM


def weightless_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device, **settings: Any
) -> PreTrainedModel:
    """The model of a configuration in eval mode, whose weights take no memory: it can be traced but not run.

    Args:
        config: its configuration.
        dtype: the dtype of its weights.
        device: where its weights would be.
        settings: further arguments of `from_config`, such as `attn_implementation`.
    """
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype, **settings)
    drop_memory(model, device)
    return model.eval()


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype in which `from_pretrained` loads a folder's model: the configuration's, or else its first weight's.

    Raises:
        UsageError: neither names a dtype.
    """
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    for file in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(Exception), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                stored = weights.get_slice(name).get_dtype()
                if stored in _DTYPES:
                    return _DTYPES[stored]
    raise UsageError(f"neither {folder}/config.json nor weights say which dtype the model has; give a dtype")


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in a local folder.

    Raises:
        UsageError: transformers can't read one there.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # transformers raises many classes
        text = " ".join(str(exc).split())[:300]
        raise UsageError(f"{folder}/config.json is not a configuration that transformers knows: {text}") from exc
