"""`glowplug doctor`: examines a machine, and says what keeps glowplug from compiling there."""

from __future__ import annotations

from glowplug.cli.doctor.command import doctor

__all__ = ["doctor"]
