"""Plain modules."""
from __future__ import annotations
from typing import Any
def attach_module(model: Any, options: Any) -> None: ...
