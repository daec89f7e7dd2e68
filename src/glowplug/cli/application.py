"""The typer application, and the one place that turns errors into one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from glowplug.cli.cache import cache_app
from glowplug.cli.doctor import doctor
from glowplug.errors import GlowplugError

# Newer versions of typer bundle click, so click's own class may be a different one.
_CommandLineError: Any = typer.BadParameter.__mro__[2]

USAGE_EXIT = 2
INTERRUPTED_EXIT = 130


class OneLineGroup(TyperGroup):
    """Reports a user's error in one line, never as a traceback or a box."""

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Run a command line, and end the process with its exit code."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False
        try:
            code = super().main(args=arguments, prog_name=prog_name or "glowplug", **extra)
        except GlowplugError as exc:
            _say(exc)
            code = USAGE_EXIT
        except _CommandLineError as exc:
            _say(exc.format_message() + missing)
            code = USAGE_EXIT
        except OSError as exc:  # a full disk, no permission
            if exc.filename is None:
                raise
            _say(f"{exc.strerror}: {exc.filename}")
            code = USAGE_EXIT
        except (KeyboardInterrupt, typer.Abort):
            _say("interrupted")
            code = INTERRUPTED_EXIT
        sys.exit(code if isinstance(code, int) else 0)


def _say(message: object) -> None:
    """One line on stderr."""
    print("glowplug:", " ".join(str(message).split()), file=sys.stderr)


app = typer.Typer(
    cls=OneLineGroup,
    help="Cold-starts torch.compile in seconds at any depth: each distinct piece of a model compiles once.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _register() -> str:
    """Add the commands; returns why some are missing. Most need transformers, which `doctor` must do without."""
    why = ""
    try:
        from glowplug.cli.bake import bake_command
        from glowplug.cli.bench import bench
        from glowplug.cli.demo import demo
        from glowplug.cli.explain import explain
        from glowplug.cli.generate import generate
        from glowplug.cli.starts import starts
        from glowplug.cli.sweep import sweep_command
    except ImportError as exc:
        if (exc.name or "").partition(".")[0] != "transformers":
            raise
        why = " Most commands need transformers>=5.17: pip install 'glowplug[hf]'"
    else:
        for command in (bench, generate, explain, demo, starts):
            app.command()(command)
        app.command("sweep")(sweep_command)
        app.command("bake")(bake_command)
    app.add_typer(cache_app, name="cache")
    app.command()(doctor)
    return why


missing = _register()


def main() -> None:
    """The entry point of the `glowplug` command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            # An exception, as for Ctrl-C, so that the command stops its processes and deletes its temporary folders.
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    app()
