"""`LayerHandle`: the opaque value by which a layer op finds its layer. Dynamo lifts it to a graph input.

The only module that uses torch's opaque-object API (private; checked on torch 2.11 and 2.13).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from glowplug.errors import LayerLookupError, UnsupportedTorchError

try:
    from torch._library.opaque_object import get_opaque_type_name, register_opaque_type
    from torch._opaque_base import OpaqueBase
except ImportError as exc:  # pragma: no cover - depends on the torch installed
    raise UnsupportedTorchError(
        "glowplug needs torch's hoisted opaque values (torch._library.opaque_object), which came with torch 2.11; "
        f"this torch does not have them ({exc}). Install torch>=2.11."
    ) from exc


class LayerHandle(OpaqueBase):
    """Names one layer of one registered model, without being a constant in any graph.

    Equal handles name the same layer of the same model. Copying a model detaches its handles until the copy is
    registered, so a copy can never reach the original's weights.

    Args:
        scope: number of the registry that created the handle, unique in the process; -1 if the handle is detached.
        name: the layer's qualified name in its model, such as `"model.layers.3.mlp.experts"`.
    """

    __slots__ = ("_layer", "name", "scope")

    def __init__(self, scope: int, name: str) -> None:
        self.scope = scope
        self.name = name
        self._layer: weakref.ref[nn.Module] | None = None

    def attach(self, layer: nn.Module) -> None:
        """Point the handle at its layer. The reference is weak, so that a handle never keeps weights alive."""
        self._layer = weakref.ref(layer)

    def resolve(self) -> nn.Module:
        """The layer object.

        Raises:
            LayerLookupError: the handle belongs to no registered model, or the model is gone.
        """
        layer = self._layer() if self._layer is not None else None
        if layer is None:
            raise LayerLookupError(
                f"no live layer for handle {self.name!r} (scope {self.scope}): its model was copied, unpickled or "
                "deleted after it was registered. Register the model that you run: glowplug.register_layers(model), "
                "or glowplug.compile(model)."
            )
        return layer

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerHandle) and (self.scope, self.name) == (other.scope, other.name)

    def __hash__(self) -> int:
        return hash((self.scope, self.name))

    def __repr__(self) -> str:
        return f"LayerHandle({self.scope!r}, {self.name!r})"

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return repr(self), {"LayerHandle": LayerHandle}

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerHandle, (-1, self.name)


register_opaque_type(LayerHandle, typ="value", hoist=True)

HANDLE_TYPE_NAME: str = get_opaque_type_name(LayerHandle)
"""The handle's type in a `torch.library` schema."""
