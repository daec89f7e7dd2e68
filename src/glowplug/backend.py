"""`torch.compile(model, backend="glowplug")`: cuts each graph of Dynamo and compiles each distinct piece once.

torch finds it through the `torch_dynamo_backends` entry point. Dynamo keeps its guards, so the backend is safe for any
module; it traces every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from glowplug.compilers import PieceCompiler, cool_down, get_compiler, warm_up
from glowplug.errors import CaptureError, CompileError, UsageError
from glowplug.graph.capture import describe
from glowplug.ops import find_layer_op
from glowplug.program import PieceCache, build_program
from glowplug.reasons import why
from glowplug.report import Report

_OPTIONS = ("compiler", "report", "strict")


def glowplug_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend.

    Args:
        gm: Dynamo's graph, with sources on its placeholders.
        example_inputs: only show the device and whether gradients are needed; the placeholders carry fake tensors.
        options: `torch.compile(options=...)`: `"compiler"`, a piece compiler or its name (default `"inductor"`);
            `"report"`, a `glowplug.Report` to fill in; `"strict"`, to raise instead of running eager.
        mode: not supported.

    Returns:
        A callable that takes the graph's inputs. The graph itself, run eagerly, if gradients are needed.

    Raises:
        UsageError: an unknown option, or a mode.
    """
    settings = dict(options or {})
    unknown = sorted(set(settings) - set(_OPTIONS))
    if unknown or mode is not None:
        wrong = f"unknown options {', '.join(unknown)}" if unknown else f"mode={mode!r} is not supported"
        raise UsageError(f'backend="glowplug": {wrong}; options are {", ".join(_OPTIONS)}')
    compiler: PieceCompiler = get_compiler(settings.get("compiler", "inductor"))
    report: Report = settings.get("report") or Report()
    report.compiler = compiler.name
    needs_grad = any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
    if torch.is_grad_enabled() and needs_grad:
        report.fall_back("grad mode is on and inputs or weights need gradients; run under torch.no_grad()")
        return _differentiable(gm).forward
    try:
        warm_up(compiler, _device_type(example_inputs))
        captured = describe(gm)
        arguments = {entry.node: entry.source for entry in captured.inputs}
        handles = {entry.node: entry.value for entry in captured.inputs if entry.type == "handle"}
        program = build_program(
            captured, compiler=compiler, report=report, cache=PieceCache(), arguments=arguments, bound=handles
        ).program
    except (CaptureError, CompileError, OSError) as exc:
        if settings.get("strict"):
            raise
        report.fall_back(why(exc))
        return _differentiable(gm).forward
    finally:
        cool_down(compiler)
    if report.strategy == "eager":
        report.strategy = "hoisted"
    return program.run


def _device_type(inputs: Sequence[Any]) -> str:
    """The device type on which a graph with these inputs runs: the CPU unless one of them is on another device."""
    types = [value.device.type for value in inputs if isinstance(value, torch.Tensor)]
    return next((device_type for device_type in types if device_type != "cpu"), "cpu")


def _differentiable(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with its layer ops called as plain Python, so that gradients flow through their bodies."""
    for node in gm.graph.nodes:
        op = find_layer_op(node.target) if node.op == "call_function" else None
        if op is not None:
            node.target = op.direct(node.target)
    gm.recompile()
    return gm
