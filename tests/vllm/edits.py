"""What a worker changes in the decoder between two generations."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn


def _owner(decoder: Any, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return decoder.get_submodule(path), leaf


def _other(weight: Tensor, seed: int) -> Tensor:
    """Other values of the same layout."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + 0.5 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def in_place(decoder: Any, name: str, seed: int) -> None:
    """New values in the same memory."""
    owner, leaf = _owner(decoder, name)
    weight = getattr(owner, leaf)
    weight.copy_(_other(weight, seed))


def data(decoder: Any, name: str, seed: int) -> None:
    """The same parameter, in other memory."""
    owner, leaf = _owner(decoder, name)
    weight = getattr(owner, leaf)
    weight.data = _other(weight, seed)


def parameter(decoder: Any, name: str, seed: int, dtype: str = "float32") -> None:
    """Another parameter."""
    owner, leaf = _owner(decoder, name)
    own = getattr(owner, leaf)
    weight = _other(own, seed).to(getattr(torch, dtype))
    setattr(owner, leaf, nn.Parameter(weight, requires_grad=own.requires_grad))


def module(decoder: Any, name: str, seed: int) -> None:
    """Another module, whose weight has other values."""
    parent, leaf = _owner(decoder, name)
    own = getattr(parent, leaf)
    new = object.__new__(type(own))
    new.__dict__ = {**own.__dict__, "_parameters": dict(own._parameters)}
    for attribute, value in vars(own).items():
        if getattr(value, "__self__", None) is own:
            new.__dict__[attribute] = types.MethodType(value.__func__, new)
    new.weight = nn.Parameter(_other(own.weight, seed), requires_grad=own.weight.requires_grad)
    setattr(parent, leaf, new)
