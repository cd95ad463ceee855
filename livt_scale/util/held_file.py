"""A lock for file systems without flock(2): a file that exists while it is held. Chosen by LIVT_LOCK=file.

    take(Path("runs/a/.lock.held"))     None: ours; else who holds it, "process 4711 on node3"

The file is created with O_EXCL and names machine, boot, process and Slurm job of its holder. Unlike flock, the kernel
does not release it when the holder is killed. So a file is taken over where its holder has certainly ended: its process
is gone, this machine was started again since, or it was an earlier start of this Slurm job. On another machine that
cannot be known, and the lock counts as held until somebody removes the file.

Two processes that find the same leftover take turns by a second file (`.takeover`), which exists for milliseconds;
otherwise the slower one could remove the lock that the faster one has just taken.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from livt_scale.util.outside import read_json


def take(path: Path) -> str | None:
    """Create `path`, naming this process. None: done; else who holds it. Raises OSError."""
    if _create(path, _this_process()):
        return None
    found = _read(path)
    if not _has_ended(found):
        return _name(found)
    takeover = path.with_name(f"{path.name}.takeover")
    if not _create(takeover, {}):
        return f"{_name(found)}, which has ended, or the process that removes {takeover}"
    try:
        if _read(path) == found:
            path.unlink(missing_ok=True)
    finally:
        takeover.unlink(missing_ok=True)
    return None if _create(path, _this_process()) else _name(_read(path))


def holder(path: Path) -> str | None:
    """Who holds `path`; None: nobody. Writes nothing."""
    found = _read(path)
    return None if not path.exists() or _has_ended(found) else _name(found)


def _create(path: Path, content: dict[str, Any]) -> bool:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file, suppress(OSError):  # a full disk costs the name, not the lock
        file.write(json.dumps(content))
    return True


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),  # a process id is used again
        "host": socket.gethostname(),
        "machine": _line("/etc/machine-id"),  # two machines may have one host name
        "boot": _line("/proc/sys/kernel/random/boot_id"),
        "processes": _space_of_process_ids(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _space_of_process_ids() -> int:
    """Differs between containers of one machine; 0: not known."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _read(path: Path) -> dict[str, Any]:
    """What the holder wrote; empty where it is gone, is being written, or is not ours."""
    try:
        found = read_json(path, "note")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_ended(found: dict[str, Any]) -> bool:
    ours = _this_process()

    def same(*names: str) -> bool:
        return all(ours[name] and found.get(name) == ours[name] for name in names)

    if same("boot", "processes"):  # a container on this machine has process ids that mean others here
        return not _is_running(found.get("pid"), found.get("started"))
    if same("host", "machine") and found.get("boot") and found["boot"] != ours["boot"]:
        return True
    return same("job") and _count(found.get("restarts")) < _count(ours["restarts"])


def _is_running(pid: Any, started: Any) -> bool:
    try:
        return bool(abs(psutil.Process(int(pid)).create_time() - float(started)) < 1)
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return True  # unknown, so it counts as running


def _count(text: Any) -> int:
    return int(text) if isinstance(text, str) and text.isdecimal() else 0


def _name(found: dict[str, Any]) -> str:
    if not {"pid", "host"} <= found.keys():
        return "another process"
    return f"process {found['pid']} on {found['host']}"
