"""Files that a command writes where an option says: it replaces its own, and anything else only with --force.

    check_output(Path("photos.csv"), marks=[b"file,error,number_1"], command="predict", force=False)

What the command wrote is recognised by a mark near the start of the file. For folders of exports see
`livt_scale.export.write_export`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from livt_scale.util.errors import UsageError
from livt_scale.util.outside import open_checked

HEAD_BYTES = 4096


def check_output(path: Path, *, marks: Sequence[bytes], command: str, force: bool) -> None:
    """Raise UsageError if `path` is there, is not empty, and holds none of `marks` in its first bytes."""
    if not os.path.lexists(path):
        return
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a regular file", remedy="give another file")
    if force or not path.exists():  # a link that leads nowhere is replaced
        return
    try:
        with open_checked(path, "log") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", remedy="give another file") from error
    if head and not any(mark in head for mark in marks):
        raise UsageError(
            f"{path} is there already, and livt {command} did not write it",
            remedy="give another file, or --force to replace it",
        )
