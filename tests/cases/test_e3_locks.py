"""Case E3: a file system without flock; the lock by a file in its place."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from livt_scale.data.remote.cache import ShardCache
from livt_scale.doctor import checks
from livt_scale.train import run_dir
from livt_scale.util import held_file
from livt_scale.util.atomic import LockHeld, LocksMissing, file_lock, lock_works
from livt_scale.util.errors import DataError, RunBusyError, UsageError


@pytest.fixture
def no_flock(monkeypatch):
    def missing(_handle: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)


@pytest.fixture(scope="session")
def noflock_so(tmp_path_factory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("noflock")
    (folder / "noflock.c").write_text(
        "#include <errno.h>\nint flock(int fd, int op) { (void)fd; (void)op; errno = ENOSYS; return -1; }\n"
    )
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "noflock.so", folder / "noflock.c"], check=True)
    return folder / "noflock.so"


TAKE_LOCK = """
import sys
from pathlib import Path
from livt_scale.util.atomic import file_lock, lock_works
from livt_scale.util.errors import LivtError
try:
    with file_lock(Path(sys.argv[1]) / "lock"):
        print("held", sorted(p.name for p in Path(sys.argv[1]).iterdir()))
except LivtError as error:
    print(error)
print(lock_works(Path(sys.argv[1])))
"""


def test_e3_in_a_process_without_flock_the_error_names_path_and_cause_and_its_remedy_works(tmp_path, noflock_so):
    def run(**environ: str) -> list[str]:
        environ = {**os.environ, "LD_PRELOAD": str(noflock_so), "PYTHONPATH": os.pathsep.join(sys.path), **environ}
        words = [sys.executable, "-c", TAKE_LOCK, str(tmp_path)]
        return subprocess.run(words, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()

    said, works = run()
    assert f"{tmp_path / 'lock'} cannot be locked" in said
    assert "no flock (Function not implemented)" in said
    assert "LIVT_LOCK=file" in said
    assert works == "False"
    (tmp_path / "lock").unlink()
    assert run(LIVT_LOCK="file") == ["held ['lock.held']", "True"]
    assert list(tmp_path.iterdir()) == []


def test_e3_a_run_directory_without_locks_is_named(tmp_path, no_flock):
    with pytest.raises(LocksMissing, match=re.escape(str(tmp_path / "run"))), run_dir.hold(tmp_path / "run"):
        pass


def test_e3_a_cache_without_locks_is_named(tmp_path, no_flock, monkeypatch):
    monkeypatch.setenv("LIVT_LOCK", "file")
    info = SimpleNamespace(name="a.tar", bytes=3, sha256="0" * 64)
    with pytest.raises(DataError, match="no flock") as error:
        ShardCache(tmp_path, limit=10).hold(info, lambda path: path.write_bytes(b"abc"), wait_s=1)
    assert "data.cache.dir" in error.value.remedy


def test_e3_doctor_tests_a_lock(tmp_path, monkeypatch, no_flock):
    monkeypatch.chdir(tmp_path)
    (found,) = checks._locks()
    assert (found.name, found.status) == ("locks", "problem")
    assert "LIVT_LOCK=file" in found.fix
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (found,) = checks._locks()
    assert found.status == "ok"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def by_file(monkeypatch, no_flock):
    monkeypatch.setenv("LIVT_LOCK", "file")


def test_e3_the_lock_by_file_keeps_others_out_and_names_its_holder(tmp_path, by_file):
    with run_dir.hold(tmp_path), pytest.raises(RunBusyError) as error, run_dir.hold(tmp_path):
        pass
    assert f"process {os.getpid()} on {socket.gethostname()}" in error.value.message
    assert f"if it has ended, remove {tmp_path / '.lock.held'}" in error.value.remedy
    with run_dir.hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def ended_child() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


ELSEWHERE = {"host": "other", "machine": "m", "boot": "b", "processes": 1}
LEFTOVERS = {  # what differs from this process, and whether the holder has certainly ended
    "a killed process": ({"pid": ended_child}, True),
    "a process id that is used again": ({"started": 1.0}, True),
    "before a reboot": ({"boot": "before", "processes": 1}, True),
    "a live process": ({}, False),
    "a container here": ({"processes": 1, "pid": ended_child}, False),
    "a machine of the same name": ({"machine": "m", "boot": "b"}, False),
    "another machine": (ELSEWHERE, False),
    "an earlier start of this job elsewhere": ({**ELSEWHERE, "job": "7", "restarts": "0"}, True),
    "another job elsewhere": ({**ELSEWHERE, "job": "8", "restarts": "0"}, False),
    "this start of this job elsewhere": ({**ELSEWHERE, "job": "7", "restarts": "1"}, False),
}


@pytest.mark.parametrize(("changed", "ended"), LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_e3_a_leftover_is_taken_over_only_where_its_holder_has_certainly_ended(
    tmp_path, by_file, monkeypatch, changed, ended
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    found = held_file._this_process() | {k: v() if callable(v) else v for k, v in changed.items()}
    held = tmp_path / "lock.held"
    held.write_text(json.dumps(found))
    if ended:
        with file_lock(tmp_path / "lock"):
            assert json.loads(held.read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(LockHeld, match=f"process {found['pid']} on {found['host']}"):
            file_lock(tmp_path / "lock")
        assert json.loads(held.read_text()) == found


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": "x"}', b'{"boot": null, "pid": null}'])
def test_e3_a_leftover_that_cannot_be_read_counts_as_held(tmp_path, by_file, content):
    (tmp_path / "lock.held").write_bytes(content)
    with pytest.raises(LockHeld):
        file_lock(tmp_path / "lock")
    (tmp_path / "lock.held").unlink()
    os.mkfifo(tmp_path / "lock.held")
    with pytest.raises(LockHeld):
        file_lock(tmp_path / "lock")


def test_e3_of_two_that_find_a_leftover_one_gets_the_lock(tmp_path, by_file, monkeypatch):
    """The slower one has read the leftover, and finds the lock of the faster one in its place."""
    held = tmp_path / "lock.held"
    held.write_text(json.dumps(held_file._this_process() | {"pid": ended_child()}))
    read, locks = held_file.read_json, []

    def slower(path: Path, kind: str) -> object:
        found = read(path, kind)
        if not locks:
            monkeypatch.setattr(held_file, "read_json", read)
            locks.append(file_lock(tmp_path / "lock"))
        return found

    monkeypatch.setattr(held_file, "read_json", slower)
    with pytest.raises(LockHeld, match=f"process {os.getpid()} "):
        file_lock(tmp_path / "lock")
    assert json.loads(held.read_text())["pid"] == os.getpid()


def test_e3_another_kind_of_lock_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LIVT_LOCK", "nfs")
    with pytest.raises(UsageError, match="LIVT_LOCK is 'nfs'"):
        lock_works(tmp_path)
