"""What appears under its name is whole; a failure leaves what was there, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from livt_scale.util import atomic
from livt_scale.util.atomic import LockHeld, file_lock

HOSTILE = "a 'quoted\" name\nof two lines"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / HOSTILE / "eval.json"
    atomic.write_atomic(path, b"first")
    atomic.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_bytes_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eval.json"
    atomic.write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / HOSTILE / "export"
    with atomic.new_folder(out) as temporary:
        (temporary / "a").write_bytes(b"1")
        assert not out.exists()
    with pytest.raises(ZeroDivisionError), atomic.new_folder(out) as temporary:  # noqa: PT012
        (temporary / "a").write_bytes(b"2")
        raise ZeroDivisionError
    assert (out / "a").read_bytes() == b"1"
    with atomic.new_folder(out) as temporary:
        (temporary / "b").write_bytes(b"3")
    assert [p.name for p in out.iterdir()] == ["b"]
    assert list(out.parent.iterdir()) == [out]


def test_what_is_written_can_be_read_by_the_group_if_the_umask_says_so(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    atomic.write_atomic(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == plain.stat().st_mode
    (tmp_path / "folder").mkdir()
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode


# --- the lock ---

HOLDER = """
import sys, time
from pathlib import Path
from livt_scale.util.atomic import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A process that holds tmp_path/lock, and its Popen."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_is_held_is_refused_within_the_bound_and_its_holder_named(tmp_path, held):
    began = time.monotonic()
    with pytest.raises(LockHeld) as refused:
        file_lock(tmp_path / "lock", wait_s=0.2)
    assert time.monotonic() - began < 10
    assert refused.value.holder == f"process {held.pid} on {socket.gethostname()}"
    assert str(tmp_path / "lock") in refused.value.message


def test_a_killed_holder_leaves_the_lock_free(tmp_path, held):
    held.kill()
    with file_lock(tmp_path / "lock", wait_s=30):
        assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_one_that_waits_gets_the_lock_when_it_is_released_though_the_file_is_removed(tmp_path):
    path, order = tmp_path / "lock", []

    def wait():
        with file_lock(path, wait_s=30):
            order.append("waited")

    with file_lock(path, remove=True):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join(30)
    assert order == ["first", "waited"]


def test_an_error_in_the_block_releases_the_lock(tmp_path):
    with pytest.raises(ZeroDivisionError), file_lock(tmp_path / "lock", remove=True):
        _ = 1 / 0
    assert not (tmp_path / "lock").exists()
    with file_lock(tmp_path / "lock"):
        pass


def test_a_folder_that_is_missing_and_a_link_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_lock(tmp_path / "none" / "lock")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        file_lock(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()
