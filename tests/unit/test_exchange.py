"""A folder takes the place of another at one stroke: never a moment without one, nothing left behind, nothing of others touched."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lowbit.checkpoint import exchange, folder
from lowbit.checkpoint.exchange import beside
from lowbit.errors import CheckpointError

LONG_AGO = (0.0, 0.0)


def fill(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


WAYS = pytest.mark.parametrize("at_once", [True, False], ids=["one call", "two renames"])


@WAYS
def test_the_new_folder_takes_the_place(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "_exchange_at_once", lambda one, other: False)
    target = tmp_path / "deep" / "model"
    for text in ("first", "second"):
        with beside(target) as temporary:
            fill(temporary, text)
        assert (target / "config.json").read_text() == text
        assert names(tmp_path / "deep") == ["model"]


@WAYS
def test_a_block_that_fails_changes_nothing(at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(exchange, "_exchange_at_once", lambda one, other: False)
    target = fill(tmp_path / "model", "first")
    with pytest.raises(KeyboardInterrupt), beside(target) as temporary:
        fill(temporary, "second")
        raise KeyboardInterrupt
    assert (target / "config.json").read_text() == "first" and names(tmp_path) == ["model"]


def test_the_place_is_never_empty(tmp_path: Path) -> None:
    """A reader who looks all the time finds a whole folder each time."""
    one, other = fill(tmp_path / "one", "first"), fill(tmp_path / "model", "second")
    if not exchange._exchange_at_once(one, other):
        pytest.skip("this file system cannot exchange two names in one call")
    stop, found = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            found.append((other / "config.json").read_text())

    reader = threading.Thread(target=look)
    reader.start()
    try:
        while len(found) < 500 and reader.is_alive():
            exchange.exchange(one, other)
    finally:
        stop.set()
        reader.join()
    assert len(found) >= 500 and set(found) <= {"first", "second"}


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    target = fill(tmp_path / "model", "first")
    program = (
        "import os, sys, signal\n"
        "from pathlib import Path\n"
        "from lowbit.checkpoint.exchange import beside\n"
        f"with beside(Path({str(target)!r})) as temporary:\n"
        "    (temporary / 'config.json').write_text('second')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL and len(names(tmp_path)) == 2
    left = next(path for path in tmp_path.iterdir() if path != target)
    with beside(target):
        assert left.exists()  # too young to be told from one that is about to be locked
    os.utime(left, LONG_AGO)
    with beside(target) as temporary:
        assert not left.exists()
        fill(temporary, "third")
    assert (target / "config.json").read_text() == "third" and names(tmp_path) == ["model"]


def test_a_folder_that_somebody_is_writing_stays(tmp_path: Path) -> None:
    target, other = tmp_path / "model", fill(tmp_path / ".model.partial", "mine")
    with beside(target) as first:
        os.utime(first, LONG_AGO)
        with beside(target) as second:
            assert first.exists() and first != second
            fill(second, "second")
        fill(first, "first")
    assert (target / "config.json").read_text() == "first"  # whoever ends last
    assert names(tmp_path) == [other.name, "model"]


def test_a_link_stays_and_one_to_itself_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "loop").symlink_to("loop")
    with folder.replace_folder(tmp_path / "link") as temporary:
        fill(temporary, "first")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "model" / "config.json").is_file()
    with pytest.raises(CheckpointError, match="cannot save to"), folder.replace_folder(tmp_path / "loop"):
        pass
    assert names(tmp_path) == ["link", "loop", "model"]


def test_a_file_system_without_links_takes_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = fill(tmp_path / "model", "first")
    fill(target / "checkpoint-1", "a trainer's")

    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with folder.update_folder(target, outdated=lambda name: False) as temporary:
        (temporary / "new.txt").write_text("new")
    assert names(target) == ["checkpoint-1", "config.json", "new.txt"]
    assert (target / "checkpoint-1" / "config.json").read_text() == "a trainer's"
