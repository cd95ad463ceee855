"""Faults for the store, in a process that has torch loaded and forks a child a fault. Run by test_faults.py.

faults.py kill FOLDER new|same      a child is killed before each call that touches the disk, one after the other
faults.py loop FOLDER               a child that saves without end is killed at random moments
faults.py limit FOLDER              files may not grow beyond what half a checkpoint needs
faults.py full FOLDER               FOLDER lies on a small file system: save until it is full
faults.py readonly FOLDER           FOLDER is a file system of its own, which turns read-only between two saves
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from livt_scale.checkpoint import io as files
from livt_scale.checkpoint.load import (
    Position,
    Retention,
    Saver,
    clean_leftovers,
    list_checkpoints,
    newest_whole,
    read_tensors,
)
from livt_scale.util.errors import CheckpointError


def state(value: float, size: int = 3000) -> dict[str, torch.Tensor]:
    return {f"model.{name}": torch.full((size,), float(value)) for name in "ab"}


def save(saver: Saver, value: float, *, step: int, size: int = 3000) -> None:
    saver.save(state(value, size), position=Position(0, step), facts={"value": value})


def in_child(work: Callable[[], None]) -> int:
    """Fork, work, and return the wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr, flush=True)
            os._exit(3)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def die_at(call: int) -> None:
    """Kill this process before the `call`-th thing that it does to the disk."""
    seen = [0]

    def hook(function):
        def counted(*args, **kwargs):
            if seen[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1
            return function(*args, **kwargs)

        return counted

    for name in ("rename", "fsync", "open", "mkdir", "unlink", "rmdir"):
        setattr(os, name, hook(getattr(os, name)))
    io.open = hook(io.open)
    small, large = files.HashedFile.write, hook(files.HashedFile.write)
    # a small write stays in the buffer until the flush or the close: a kill there is one before the next call
    files.HashedFile.write = lambda self, data: (large if len(data) > 8192 else small)(self, data)
    files.HashedFile.flush = hook(files.HashedFile.flush)
    files.HashedFile.close = hook(files.HashedFile.close)


def kill_at_each_point(folder: Path, *, step: int) -> dict:
    """Old: step 1, of value 1. New: `step`, of value 2. After each kill one of the two is found, and it is whole."""
    origin = folder / "origin"
    with Saver(origin, mode="sync", retention=Retention(keep_last=1)) as saver:
        save(saver, 1, step=1)
    old_or_new = {"old": 0, "new": 0}
    for call in range(10_000):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(origin, work)

        def child(call: int = call, work: Path = work) -> None:
            die_at(call)
            with Saver(work, mode="sync", retention=Retention(keep_last=1)) as saver:
                save(saver, 2, step=step)

        status = in_child(child)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), status
        value = check(work, {1.0, 2.0})
        old_or_new["old" if value == 1 else "new"] += 1
        if os.waitstatus_to_exitcode(status) == 0:
            assert value == 2
            return {**old_or_new, "points": call}
        if call % 7 == 0:  # and the run goes on
            with Saver(work, mode="sync", retention=Retention(keep_last=1)) as saver:
                save(saver, 3, step=3)
            assert check(work, {3.0}) == 3
            assert [p.name for p in work.iterdir()] == ["step-00000003"]
    raise AssertionError("the save never ended")


def check(folder: Path, values: set[float]) -> float:
    """What a start after the kill finds: only whole ones, the newest of one value throughout. Returns that value."""
    assert all(info.whole for info in list_checkpoints(folder)), [info.why for info in list_checkpoints(folder)]
    clean_leftovers(folder)
    assert all(info.whole for info in list_checkpoints(folder))
    assert all(path.name.startswith("step-") for path in folder.iterdir())
    newest = newest_whole(folder)
    assert newest is not None
    found = {float(v) for tensor in read_tensors(newest).values() for v in tensor.unique()}
    assert len(found) == 1
    assert found <= values, found
    return found.pop()


def kill_at_random_moments(folder: Path) -> dict:
    with Saver(folder, mode="sync") as saver:
        save(saver, 0, step=0, size=200_000)
    reached = 0.0
    for seed in range(8):

        def child(start: float = reached) -> None:
            with Saver(folder, mode="async", retention=Retention(keep_last=2)) as saver:
                for step in range(int(start) + 1, 10**6):
                    save(saver, step, step=step, size=200_000)

        pid = os.fork()
        if pid == 0:
            child()
            os._exit(0)
        time.sleep(random.Random(seed).uniform(0.02, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        value = check(folder, {float(v) for v in range(10**4)})
        assert newest_whole(folder).name == f"step-{int(value):08d}"
        assert value >= reached
        reached = value
    return {"reached": reached}


def under_a_file_size_limit(folder: Path) -> dict:
    """ulimit -f: the write fails half way through the data file, as on a full disk."""
    with Saver(folder, mode="async", retention=Retention(keep_last=1)) as saver:
        save(saver, 1, step=1)
        saver.wait()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        said = failure(saver, 2, size=100_000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert [p.name for p in folder.iterdir()] == ["step-00000001"]
        check(folder, {1.0})
        save(saver, 3, step=3)
    assert check(folder, {3.0}) == 3
    return {"said": said}


def on_a_full_disk(folder: Path) -> dict:
    """The file system has less room than it says at the check: another process fills it meanwhile."""
    with Saver(folder / "c", mode="async", retention=Retention(keep_last=1)) as saver:
        save(saver, 1, step=1)
        saver.wait()
        said = [failure(saver, 2, size=1_000_000)]
        files.free_bytes = lambda folder: 1 << 40
        said.append(failure(saver, 2, size=1_000_000))
        assert [p.name for p in (folder / "c").iterdir()] == ["step-00000001"]
        save(saver, 3, step=3)
    assert check(folder / "c", {3.0}) == 3
    return {"said": said}


def on_a_read_only_disk(folder: Path) -> dict:
    """As a file system does that has met an error."""

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    with Saver(folder / "c", mode="async", retention=Retention(keep_last=1)) as saver:
        save(saver, 1, step=1)
        saver.wait()
        remount("ro")
        said = [failure(saver, 2, size=1000)]
        assert check(folder / "c", {1.0}) == 1
        try:
            Saver(folder / "d", mode="sync")
        except CheckpointError as error:
            said.append(str(error))
        remount("rw")
        save(saver, 3, step=3)
    assert check(folder / "c", {3.0}) == 3
    return {"said": said}


def failure(saver: Saver, value: float, *, size: int) -> str:
    try:
        save(saver, value, step=int(value), size=size)
        saver.wait()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the save went well")


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "kill":
        result = kill_at_each_point(folder, step={"new": 2, "same": 1}[sys.argv[3]])
    else:
        result = {
            "loop": kill_at_random_moments,
            "limit": under_a_file_size_limit,
            "full": on_a_full_disk,
            "readonly": on_a_read_only_disk,
        }[what](folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
