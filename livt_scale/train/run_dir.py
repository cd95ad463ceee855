"""The run directory: its lock, its recipe, the status of its stages.

RUN/recipe.yaml          the resolved recipe, written at the first start
RUN/.lock                held (flock) by rank 0 while it works here; a second start is refused
RUN/STAGE/status.json    running | preempted | failed | done, why and since when; the progress of the ranks;
                         starts, and how the earlier ones ended (`history`, the oldest first)

running -> done | preempted | failed;   preempted, failed or a stale running -> running (the next start)
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import STAGES, Recipe, Stage
from livt_scale.config.run_place import LOCK, SAVED
from livt_scale.train.run_files import STATUS, State, read_status, read_status_file
from livt_scale.util.atomic import LockHeld, file_lock, lock_holder, write_atomic
from livt_scale.util.errors import LivtError, Preempted, RunBusyError, RunError
from livt_scale.util.log import DiskWarning
from livt_scale.util.outside import read_checked

MAX_HISTORY = 20  # earlier starts that status.json keeps
MAX_WHY = 400  # characters of why each of them ended


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold the lock of `run_dir` (made if need be). Raises RunBusyError that names the process that holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = file_lock(run_dir / LOCK)
    except LockHeld as error:
        raise RunBusyError(
            f"{error.holder} works in {run_dir}", remedy=f"{error.remedy}; or set another run_dir"
        ) from None
    except OSError as error:
        raise RunError(f"the run directory {run_dir} cannot be written: {error.strerror}") from error
    with lock:
        yield


def check_free(run_dir: Path) -> None:
    """Raise RunBusyError if a process is seen to work in `run_dir`. Writes nothing."""
    holder = lock_holder(run_dir / LOCK)
    if holder is not None:
        raise RunBusyError(f"{holder} works in {run_dir}", remedy="wait for it, end it, or set another run_dir")


def is_run(path: Path) -> bool:
    return (path / SAVED).is_file() or any((path / stage).is_dir() for stage in STAGES)


def save_resolved(recipe: Recipe, run_dir: Path) -> None:
    """Write `recipe` as RUN/recipe.yaml. A resumed run writes it again: harmless fields may have changed."""
    text = to_yaml(recipe).encode()
    path = run_dir / SAVED
    if not path.exists() or read_checked(path, "recipe") != text:
        write_atomic(path, text)


def save_first(recipe: Recipe, run_dir: Path) -> None:
    """Write RUN/recipe.yaml if it does not exist: the recipe of a resumed run is not accepted yet."""
    if not (run_dir / SAVED).exists():
        save_resolved(recipe, run_dir)


def is_done(run_dir: Path, stage: Stage) -> bool:
    status = read_status(run_dir, stage)
    return status is not None and status["state"] == "done"


class Status:
    """Writes status.json, on the main rank; `since` moves when the state does."""

    def __init__(self, folder: Path, *, stage: Stage, writes: bool) -> None:
        self._path = folder / STATUS
        self._writes = writes
        self._now: dict[str, Any] = {"stage": stage, "host": socket.gethostname(), "pid": os.getpid()}
        self._lock = threading.Lock()  # the watchdog's thread adds the progress of the ranks
        self._warn_of_disk = DiskWarning("the file is out of date")
        if writes:
            self._now |= _earlier_starts(self._path)

    def write(self, state: State, *, why: str = "", **facts: Any) -> None:
        """Raises OSError only for `done` and `failed`: a full disk neither ends a run nor makes a stop a failure."""
        with self._lock:
            if state == "done":
                self._now.pop("ranks", None)  # their progress, no longer of interest
            if state != self._now.get("state"):
                self._now |= {"state": state, "since": _now()}
            try:
                self._put(why=why, **facts)
            except OSError as error:
                if state not in ("running", "preempted"):
                    raise
                self._warn_of_disk(self._path, error)

    def add(self, **facts: Any) -> None:
        """Add facts to the current state; do nothing if no state is written yet."""
        with self._lock:
            if "state" in self._now:
                self._put(**facts)

    def take_over(self) -> None:
        """From now on this rank writes: the main one is gone, and has left how often the stage was started."""
        self._writes = True
        with suppress(RunError):
            written = read_status_file(self._path) or {}
            self._now |= {name: value for name, value in written.items() if name in ("starts", "history")}

    def _put(self, **facts: Any) -> None:
        self._now |= {"at": _now(), **facts}
        if self._writes:
            write_atomic(self._path, (json.dumps(self._now, indent=2) + "\n").encode())

    @contextmanager
    def told(self) -> Iterator[None]:
        """Record in status.json how the block ends; `done` is for the block itself to write."""
        try:
            yield
        except Preempted as error:
            self.write("preempted", why=error.message)
            raise
        except BaseException as error:
            why = str(error) if isinstance(error, LivtError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # the disk that failed the run fails this too; report the first error
                self.write("failed", why=why)
            raise


def _earlier_starts(path: Path) -> dict[str, Any]:
    """Which start this is, and how the ones before it ended; `running` if one was killed."""
    try:
        before = read_status_file(path)
    except RunError:
        before = None
    if before is None or "starts" not in before:
        return {"starts": 1, "history": []}  # the first, or it cannot be known
    ended: dict[str, Any] = {"ended": before["state"]}  # not `state`: batch scripts look for the stage's own
    ended |= {name: value for name, value in before.items() if name in ("since", "at", "step", "host")}
    ended["why"] = before.get("why", "")[:MAX_WHY]
    return {"starts": before["starts"] + 1, "history": [*before.get("history", []), ended][-MAX_HISTORY:]}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
