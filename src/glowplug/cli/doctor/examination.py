"""The examination, part by part."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from glowplug.cli.doctor.compiling import compilers, device_types, eager, why_not
from glowplug.cli.doctor.finding import Finding
from glowplug.cli.doctor.machine import devices, environment, versions
from glowplug.cli.doctor.plug_in import plug_in
from glowplug.cli.doctor.storing import stores


def examine(*, trial: bool = True) -> list[Finding]:
    """Examine this machine.

    Args:
        trial: whether to compile and run a small module on each type of device, which takes some seconds.
    """
    with _silent():
        variables = list(environment())  # before the trial: torch sets some for its own processes
        found = [*versions(), *devices()]
        reasons = {device_type: why_not(device_type, trial=trial) for device_type in device_types()}
        found += [*compilers(reasons), *stores(), *plug_in(), *variables]
        found += eager(reasons, linux=sys.platform == "linux")
    return found


@contextmanager
def _silent() -> Iterator[None]:
    """Keep log lines of glowplug and torch off the screen: the findings say the same."""
    loggers = [logging.getLogger(name) for name in ("glowplug", "torch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
