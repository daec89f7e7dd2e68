"""`glowplug cache`: lists, verifies and prunes the artifact store."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from glowplug.cli.console import make_console
from glowplug.cli.sizes import read_size, show_age, show_size
from glowplug.errors import UsageError
from glowplug.reasons import counted
from glowplug.store import LocalStore, SigningKey, open_store
from glowplug.store.envelope import plain
from glowplug.store.local import unlink

cache_app = typer.Typer()

Location = Annotated[str | None, typer.Option("--cache", help="A folder; default: GLOWPLUG_CACHE, or your own store.")]


@cache_app.callback(invoke_without_command=True)
def cache_command(context: typer.Context) -> None:
    """The artifact store: ls, verify, prune."""
    if context.invoked_subcommand is None:
        raise UsageError("glowplug cache needs one of its commands: ls, verify, or prune")


def _open(location: str | None) -> LocalStore:
    """The local store; for a URL, the local folder in front of it."""
    if location and "://" not in location and not Path(location).expanduser().is_dir():
        raise UsageError(f"there is no artifact store in {location}; name the folder of one, or a URL")
    store = open_store(location)
    if store is None:
        raise UsageError("the artifact store is off (GLOWPLUG_CACHE); name one by --cache FOLDER")
    root = store.local.root
    if root.exists() and not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"the artifact store {root} can't be read: permission denied")
    return store.local


@cache_app.command("ls")
def list_entries(cache: Location = None) -> None:
    """List artifacts with their sizes and ages, the most recently used first."""
    store = _open(cache)
    entries = store.entries()
    table = Table()
    for name in ("kind", "key", "size", "made", "used", "signed", "what"):
        table.add_column(name, justify="right" if name in ("size", "made", "used") else "left")
    now = time.time()
    for entry in entries:
        header = entry.header
        table.add_row(
            entry.kind,
            Text(plain(entry.key[:12])),
            show_size(entry.size),
            show_age(now - header.made) if header is not None else "?",
            show_age(now - entry.used),
            ("yes" if header.signature else "no") if header is not None else "?",
            Text(plain(header.about) if header is not None else "not readable"),
        )
    console = make_console()
    if entries:
        console.print(table)
    number, total = counted(len(entries), "artifact"), show_size(sum(entry.size for entry in entries))
    console.print(f"{number}, {total}, in {store.root}", markup=False, soft_wrap=True)


@cache_app.command("verify")
def verify(
    cache: Location = None,
    signed: Annotated[bool, typer.Option("--signed", help="Also require a signature by the current key.")] = False,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is not whole.")] = False,
) -> None:
    """Read every artifact and compare its checksum; exit code 1 if one is damaged."""
    store = _open(cache)
    number = len(store.entries())
    bad = store.check(_key() if signed else None)
    console = make_console()
    for entry, problem in bad:
        outcome = ""
        if delete:
            outcome = "; deleted" if unlink(entry.path) else "; it can't be deleted"
        line = f"{entry.kind} {entry.key[:12]}: {problem}{outcome}"
        console.print(plain(line), markup=False, soft_wrap=True)
    console.print(f"{counted(number - len(bad), 'artifact')} whole, {len(bad)} not", markup=False)
    if bad:
        raise typer.Exit(1)


def _key() -> SigningKey:
    key = SigningKey.from_environment()
    if key is None:
        raise UsageError("--signed needs the key: set GLOWPLUG_SIGNING_KEY or GLOWPLUG_SIGNING_KEY_FILE")
    return key


@cache_app.command("prune")
def prune(
    max_size: Annotated[str, typer.Option(help="Keep the most recently used artifacts up to this size, such as 500M.")],
    cache: Location = None,
) -> None:
    """Delete the least recently used artifacts."""
    store = _open(cache)
    removed = store.prune(read_size(max_size))
    left = store.entries()
    freed, kept = (show_size(sum(entry.size for entry in some)) for some in (removed, left))
    line = f"deleted {counted(len(removed), 'artifact')}, {freed}; {len(left)} left, {kept}"
    make_console().print(line, markup=False)
