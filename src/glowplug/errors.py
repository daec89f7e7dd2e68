"""Every error that glowplug raises on purpose. Each message says what is wrong and what to do about it."""


class GlowplugError(Exception):
    """Base class: catch this to catch everything that glowplug raises on purpose."""


class UsageError(GlowplugError, ValueError):
    """An option, argument or input is wrong; the message names it and what is allowed."""


class UnsupportedTorchError(GlowplugError, ImportError):
    """This torch lacks something that glowplug needs; the message names the version to install."""


class LayerOrderError(GlowplugError, RuntimeError):
    """`identity="ordered"` found that layers did not run once each in the order in which they were created."""


class LayerLookupError(GlowplugError, LookupError):
    """A layer op was called for a layer that no live model has registered."""


class CaptureError(GlowplugError, RuntimeError):
    """The model could not be captured as one graph; the message carries the compiler's reason."""


class CompileError(GlowplugError, RuntimeError):
    """The piece compiler failed on a piece; the message carries its reason."""


class NotServableError(GlowplugError, RuntimeError):
    """With `strict=True`: a call (or the model) can't be served by the compiled program. Without it, eager runs."""
