"""The local store: whole files or none, nobody else's hands on it, and locks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from glowplug.errors import StoreError, UsageError
from glowplug.store import ArtifactStore, LocalStore, open_store, opening

KEY = "ab" + "c" * 62
OTHER = "ef" + "0" * 62


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "store")


def test_what_was_put_is_there(store: ArtifactStore) -> None:
    assert store.get("piece", KEY) is None
    store.put("piece", KEY, b"payload", about="a piece")
    assert store.get("piece", KEY) == b"payload"
    assert store.get("manifest", KEY) is None
    assert store.counts == {"piece misses": 1, "piece stored": 1, "piece hits": 1, "manifest misses": 1}
    assert not store.problems


def test_it_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = ArtifactStore(tmp_path / "above" / "store")
        store.put("piece", KEY, b"payload")
        with store.lock("piece", KEY):
            pass
    finally:
        os.umask(before)
    for path in (tmp_path / "above").rglob("*"):
        assert not path.stat().st_mode & 0o022, path
    assert ArtifactStore(tmp_path / "above" / "store").get("piece", KEY) == b"payload"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_of_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "above" / "store").mkdir(parents=True)
    for path in (tmp_path / "above" / "store", tmp_path / "above"):
        path.chmod(mode)
        with pytest.raises(StoreError, match="can be written to by others"):
            open_store(tmp_path / "above" / "store")
        path.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "above" / "store")
    (tmp_path / "above").chmod(mode)
    with pytest.raises(StoreError, match="can be written to by others"):
        open_store(link)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_another_users_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    os.chown(tmp_path / "store", 12345, 12345)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(tmp_path / "store")
    sticky = tmp_path / "sticky"
    (sticky / "store").mkdir(parents=True)
    sticky.chmod(0o1777)
    assert open_store(sticky / "store") is not None
    os.chown(sticky, 12345, 12345)  # who owns a sticky folder may rename what is in it
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(sticky / "store")


@pytest.mark.parametrize("what", ["pieces", "pieces/ab", f"pieces/ab/{KEY}.glow"])
def test_nothing_is_read_that_others_can_write(store: ArtifactStore, what: str) -> None:
    store.put("piece", KEY, b"payload")
    (store.local.root / what).chmod(0o777)
    assert store.get("piece", KEY) is None
    assert "others can write" in store.problems[0]


def test_a_link_that_is_changed_later_is_not_followed(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        (tmp_path / name).mkdir(mode=0o700)
    link = tmp_path / "link"
    link.symlink_to("mine")
    store = ArtifactStore(link)
    ArtifactStore(tmp_path / "other").put("piece", KEY, b"planted")
    link.unlink()
    link.symlink_to("other")
    assert store.get("piece", KEY) is None


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "dead", "loop"):
        with pytest.raises(StoreError, match="not a folder"):
            open_store(tmp_path / name)
    for place in (tmp_path / "file" / "store", "x" * 300, "a\0b"):
        found = open_store(place)  # can't be made: noted, and nothing more
        assert found is not None
        found.put("piece", KEY, b"payload")
        assert found.get("piece", KEY) is None
        assert "can't be made" in found.problems[0]
        with found.lock("piece", KEY) as held:
            assert held


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "dead link", "loop"])
def test_odd_things_in_a_files_place(store: ArtifactStore, kind: str) -> None:
    path = store.local.path("piece", KEY)
    path.parent.mkdir(parents=True, mode=0o700)
    {
        "pipe": lambda: os.mkfifo(path, 0o600),
        "folder": lambda: (path / "x").mkdir(parents=True),
        "dead link": lambda: path.symlink_to("nowhere"),
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    assert store.get("piece", KEY) is None
    store.local.entries(), store.local.check()
    store.put("piece", KEY, b"payload")
    assert store.get("piece", KEY) == (None if kind == "folder" else b"payload")


def test_which_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_store() is None  # the tests' own setting
    for text in ("off", "OFF", "0", "none"):
        assert open_store(text) is None
    monkeypatch.setenv("GLOWPLUG_CACHE", str(tmp_path / "named"))
    assert open_store().place == str(tmp_path / "named")
    with pytest.raises(UsageError, match="empty"):  # as of a variable that is not set: not the user's own store
        open_store("")
    assert open_store(tmp_path / "given").place == str(tmp_path / "given")
    monkeypatch.delenv("GLOWPLUG_CACHE")
    monkeypatch.setattr(opening, "default_root", lambda: tmp_path / "own")
    assert open_store().place == str(tmp_path / "own")
    (tmp_path / "own").chmod(0o777)
    assert open_store() is None  # nobody asked for it
    monkeypatch.setattr(opening, "default_root", lambda: Path("~/.cache"))
    assert open_store() is None


# -- locks -------------------------------------------------------------------------------------------------


def test_one_holds_a_lock_at_a_time(store: ArtifactStore) -> None:
    seen = []

    def try_it() -> None:
        with store.lock("piece", KEY, 0) as held:
            seen.append(held)
        with store.lock("piece", OTHER, 0) as held:
            seen.append(held)

    with store.lock("piece", KEY) as held:
        assert held
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()
    assert seen == [False, True]


def test_a_killed_process_holds_no_lock(store: ArtifactStore) -> None:
    code = (
        "import sys, time; from pathlib import Path; from glowplug.store import ArtifactStore\n"
        f"with ArtifactStore(Path(sys.argv[1])).lock('piece', '{KEY}'):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, store.place], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with store.lock("piece", KEY, 0) as held:
        assert not held
    process.kill()
    process.wait()
    with store.lock("piece", KEY, 5) as held:
        assert held


def test_reading_is_a_use(store: ArtifactStore) -> None:
    store.put("piece", KEY, b"payload")
    os.utime(store.local.path("piece", KEY), (1e9, 1e9))
    store.get("piece", KEY)
    assert LocalStore(store.local.root, print).entries()[0].used > time.time() - 60
