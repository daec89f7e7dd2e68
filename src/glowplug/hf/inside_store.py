"""Compiled insides of experts in the store, with what their trial found."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from typing import Any

import transformers

from glowplug.errors import NotStorableError
from glowplug.hf.kinds import Kind, Made
from glowplug.hf.manifests import sources_of
from glowplug.hf.trials import Verdict
from glowplug.layers.reads import LOADING
from glowplug.layers.structure import structure_of
from glowplug.program import PieceStore
from glowplug.reasons import said


def inside_key(pieces: PieceStore, kind: Kind, implementation: str | None) -> str | None:
    """The address of the inside of layers of a kind; None when they can't be described."""
    layer = kind.layers[0]
    try:
        facts: list[Any] = [
            pieces.environment,
            transformers.__version__,
            kind.op,
            implementation,
            kind.facts,
            structure_of(layer, LOADING),
            sorted(sources_of(layer, kind.files).items()),
        ]
    except NotStorableError:
        return None
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def load_inside(pieces: PieceStore, key: str) -> tuple[Made, Verdict | None] | None:
    """A stored inside, ready to run, and what its trial found; None for a verdict when nobody has tried it."""
    payload = pieces.store.get("inside", key)
    if payload is None:
        return None
    try:
        made, verdict = pickle.loads(payload)
        return replace(made, run=pieces.compiler.load(made.artifact)), verdict
    except Exception as exc:  # whatever a stored inside raises, it is made anew
        pieces.store.drop("inside", key, f"it can't be loaded: {said(exc)}")
        return None


def keep_inside(pieces: PieceStore, key: str, kind: Kind, made: Made, verdict: Verdict | None) -> None:
    """Store an inside by its artifact."""
    about = f"{kind.op}, {type(kind.layers[0]).__name__}"
    pieces.store.put("inside", key, pickle.dumps((made, verdict)), about)
