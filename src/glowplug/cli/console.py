"""The console that commands print to, and keeping libraries quiet."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDE = 150


def make_console() -> Console:
    """A console on stdout; 150 columns wide if stdout is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def quiet_transformers() -> None:
    """Keep transformers' warnings and progress bars off stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
