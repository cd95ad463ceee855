"""A disk that is full for everything this process writes: a limit on a file's size stands for it (EFBIG)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from livt_scale.train.loop import Hook, Loop, Step


@contextmanager
def full_disk(room: int = 0) -> Iterator[None]:
    """No file may grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk(Hook):
    """The disk is full from the beginning of step `first` to that of step `last`, or to the end of the `with` block."""

    def __init__(self, first: int, last: int | None = None) -> None:
        self._first, self._last = first, last
        self._full = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._full.close()

    def before_step(self, loop: Loop, step: Step) -> None:
        if step.number == self._first:
            self._full.enter_context(full_disk())
        elif step.number == self._last:
            self._full.close()
