"""`glowplug explain`: shows a model's pieces and what keeps them apart."""

from __future__ import annotations

from typing import Annotated

import typer

import glowplug
from glowplug.bench.models import load_model
from glowplug.bench.presets import PRESETS
from glowplug.cli.console import quiet_transformers


def explain(
    model: Annotated[str, typer.Argument(help=f"A local folder, or a preset: {', '.join(PRESETS)}.")],
    depth: Annotated[int | None, typer.Option(help="Layers. Default: the model's own.")] = None,
    identity: Annotated[str, typer.Option(help="hoisted, ordered or baked.")] = "hoisted",
    experts: Annotated[str, typer.Option(help="auto, inline or opaque.")] = "auto",
    program: Annotated[bool, typer.Option("--program", help="Print the program that runs the model.")] = False,
) -> None:
    """Show a model's pieces, which layers share them, and which argument keeps two apart. Nothing is compiled."""
    quiet_transformers()
    show = glowplug.explain_program if program else glowplug.explain
    print(show(load_model(model, depth=depth), identity=identity, experts=experts))
