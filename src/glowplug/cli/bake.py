"""`glowplug bake`: compiles a model from its configuration alone and fills a store."""

from __future__ import annotations

import resource
import sys
import time
from typing import Annotated

import torch
import typer
from transformers import PreTrainedConfig

from glowplug.bench.models import check_config, check_dtype, default_dtype, find_folder, resolve_device
from glowplug.bench.presets import PRESETS, build_config
from glowplug.bench.results.environment import describe_environment, machine_line
from glowplug.cli.console import make_console, quiet_transformers
from glowplug.cli.sizes import show_size
from glowplug.errors import UsageError
from glowplug.frontends.hf.builds import bake, read_dtype, weightless_model
from glowplug.options import Options
from glowplug.store import open_store


def bake_command(
    model: Annotated[str, typer.Argument(help="A local folder with a config.json, or a preset's name.")],
    out: Annotated[
        str | None, typer.Option(help="The store, a folder or URL. Default: GLOWPLUG_CACHE, or yours.")
    ] = None,
    depth: Annotated[int | None, typer.Option(help="Layers of a preset. Default: its own.")] = None,
    width: Annotated[str, typer.Option(help="Of a preset: tiny, full (few experts) or real (all of them).")] = "real",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    experts: Annotated[str, typer.Option(help="auto, inline or opaque.")] = "auto",
) -> None:
    """Compile a model without its weights, so that later processes start warm."""
    quiet_transformers()
    place = resolve_device(device)
    if width not in ("tiny", "full", "real"):
        raise UsageError(f"width must be tiny, full or real; not {width!r}")
    options = Options(experts=experts, cache_dir=out, ends="compiled")  # type: ignore[arg-type]
    if open_store(out) is None:
        raise UsageError("the artifact store is off, so nothing would be kept; name one by --out")
    config, chosen = _config(model, depth, width, dtype, device)
    console = make_console()
    start = time.perf_counter()
    weightless = weightless_model(config, dtype=chosen, device=place)
    size = sum(p.numel() * p.element_size() for p in weightless.parameters())
    number = sum(p.numel() for p in weightless.parameters())
    parameters = f"{number / 1e9:.1f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"
    console.print(machine_line(describe_environment(device)), markup=False)
    console.print(
        f"{type(weightless).__name__}, {parameters} parameters, {show_size(size)} of weights, none in memory",
        markup=False,
    )
    report = bake(weightless, options).report
    console.print(str(report), markup=False, soft_wrap=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    console.print(f"{time.perf_counter() - start:.1f} s; peak memory of this process {show_size(peak)}", markup=False)
    store = report.store
    if store is None or not (store.counts.get("manifest stored") or store.counts.get("manifest hits")):
        problem = store.problems[0] if store is not None and store.problems else "there is no store"
        reason = report.fallbacks[-1].reason if report.fallbacks else problem
        raise UsageError(f"the program was not stored: {reason}")


def _config(
    model: str, depth: int | None, width: str, dtype: str | None, device: str
) -> tuple[PreTrainedConfig, torch.dtype]:
    """The configuration, and the dtype to compile for."""
    wanted = check_dtype(dtype) if dtype is not None else None
    if model in PRESETS:
        chosen = wanted or check_dtype(default_dtype(device))
        size: str = "tiny" if width == "tiny" else "full"
        config = build_config(model, depth=depth, width=size, dtype=chosen, all_experts=width == "real")  # type: ignore[arg-type]
        return config, chosen
    if depth is not None:
        raise UsageError("--depth is for presets; a folder's model has its own depth")
    folder = find_folder(model)
    config = check_config(folder)
    return config, wanted or read_dtype(folder, config)
