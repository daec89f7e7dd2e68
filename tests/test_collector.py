"""While a program is made the collector stands still, and what was made meanwhile is not scanned right afterwards."""

from __future__ import annotations

import gc

import pytest

from glowplug.runtime.collector import collector_paused


def is_young(value: object) -> bool:
    return any(value is other for generation in (0, 1) for other in gc.get_objects(generation))


@pytest.mark.parametrize("frozen", [0, 375])
def test_what_is_made_in_a_pause_is_old_afterwards(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python 3.12 hundreds of objects are frozen from the start."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    with collector_paused():
        assert not gc.isenabled()
        made: list[object] = []
        assert is_young(made)
    assert gc.isenabled()
    assert not is_young(made)


def test_what_somebody_froze_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server does before it forks."""
    gc.collect()  # so that no collection is due that makes objects old
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 200_000)
    with collector_paused():
        made: list[object] = []
    assert is_young(made)
