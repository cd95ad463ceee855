"""`livt`, in a process that ends with code 77 when it writes outside its working directory or starts something."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WROTE_OUTSIDE = 77
STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen")
WRITES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
FREE = ("/dev/null", "/dev/shm/", "/proc/self/")


def run() -> None:
    """Run the command line that sys.argv holds."""
    root = Path.cwd().resolve()
    sys.path[:] = [entry for entry in sys.path if entry]  # not the example's folder
    from livt_scale.cli.main import main

    sys.addaudithook(lambda event, args: _watch(root, event, args))
    main()


def _watch(root: Path, event: str, args: tuple[object, ...]) -> None:
    if event in STARTS:
        _end(event, args)
    elif event == "open":
        flags = args[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not _inside(root, args[0]):
            _end(event, args)
    elif event in WRITES:
        paths = args[:2] if event in ("os.rename", "os.link") else args[1:2] if event == "os.symlink" else args[:1]
        follows = event in ("os.chmod", "os.truncate")  # the others act on a link itself
        if not all(_inside(root, path, follows=follows) for path in paths):
            _end(event, args)


def _inside(root: Path, path: object, *, follows: bool = True) -> bool:
    if isinstance(path, int):
        return True
    text = os.fsdecode(path)  # type: ignore[arg-type]
    folder, name = os.path.split(text)
    text = os.path.realpath(text) if follows else os.path.join(os.path.realpath(folder), name)  # noqa: PTH118
    return text.startswith(FREE) or Path(text).is_relative_to(root)


def _end(event: str, args: tuple[object, ...]) -> None:
    os.write(2, f"outside the folder: {event} {args!r}\n".encode(errors="replace"))
    os._exit(WROTE_OUTSIDE)
