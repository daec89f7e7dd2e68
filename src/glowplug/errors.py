"""The errors that glowplug raises on purpose. Each message says what is wrong and what to do about it."""

from __future__ import annotations

import sys
from pathlib import Path

OLDEST_TORCH = (2, 11)


class GlowplugError(Exception):
    """Base class of everything that glowplug raises on purpose."""


class UsageError(GlowplugError, ValueError):
    """An option, argument or input is wrong; the message names it and what is allowed."""


class UnsupportedTorchError(GlowplugError, ImportError):
    """This torch lacks something that glowplug needs; the message names the version to install."""


class LayerOrderError(GlowplugError, RuntimeError):
    """With `identity="ordered"`, the layers did not each run once in the order in which they were created."""


class LayerLookupError(GlowplugError, LookupError):
    """A layer op was called for a layer that no live model has registered."""


class CaptureError(GlowplugError, RuntimeError):
    """The model can't be captured as one graph; the message has the reason."""


class NotStampableError(GlowplugError, RuntimeError):
    """A template does not show how to run the whole stack. Never reaches the user: the model is traced in full.

    Attributes:
        layers: indices of the layers that caused it.
    """

    def __init__(self, reason: str, layers: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.layers = layers


class AttributesReadError(NotStampableError):
    """A trace read attributes that the layer kinds ignored although layers differ in them.

    Never reaches the user: the kinds are decided again.

    Attributes:
        places: where the attributes lie in a layer.
    """

    def __init__(self, places: frozenset[str]) -> None:
        super().__init__(f"the layers read {', '.join(sorted(places))}, in which they differ")
        self.places = places


class CompileError(GlowplugError, RuntimeError):
    """The piece compiler failed on a piece; the message has the reason."""


class StoreError(GlowplugError, RuntimeError):
    """The requested artifact store can't or must not be used; the message says why and what to do."""


class ArtifactError(GlowplugError, RuntimeError):
    """A stored artifact is damaged or not the expected one. Never reaches the user: it is reported and rebuilt."""


class UnsignedArtifactError(ArtifactError):
    """A stored artifact is unsigned or signed with another key. It is never loaded, but reported and rebuilt."""


class NotCarriableError(GlowplugError, RuntimeError):
    """A graph can't be compiled by another process that did not trace it."""


class NotStorableError(GlowplugError, RuntimeError):
    """Something in a program can't be stored. Never reaches the user: it is reported."""


class NotServableError(GlowplugError, RuntimeError):
    """With `strict=True`: the compiled program can't serve a call or the model. Otherwise it runs eager."""


def check_torch() -> None:
    """Raise `UnsupportedTorchError` if the installed torch is too old, before an import from it fails."""
    import torch

    version = torch.__version__.split("+")[0]
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST_TORCH:
        raise UnsupportedTorchError(
            f"glowplug needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer; torch {version} is installed. "
            f"Install it: pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'"
        )


def exit_if_command_line(error: UnsupportedTorchError) -> None:
    """End the process with one line if it runs the command `glowplug`; others that import glowplug get the error."""
    if Path(sys.argv[0]).stem == "glowplug" or sys.argv[0] == "-m":
        print(f"glowplug: {error}", file=sys.stderr)
        sys.exit(2)
