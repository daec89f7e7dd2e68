"""The command `glowplug`, one file per command, on top of the public API and `bench/`."""

from __future__ import annotations

from glowplug.cli.application import app, main

__all__ = ["app", "main"]
