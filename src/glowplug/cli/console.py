"""Where commands print to: a rich console, wide enough for tables when it is no terminal, and quiet libraries."""

from __future__ import annotations

import sys

from rich.console import Console

_WIDE = 150


def make_console() -> Console:
    """A console on stdout; in a pipe or file, where no terminal says its width, 150 columns."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def quiet_transformers() -> None:
    """Keep transformers' warnings and progress bars off stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
