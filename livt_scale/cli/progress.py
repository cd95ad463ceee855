"""Progress of a build or a verification: a bar on a terminal, else a line of the log now and then; on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from livt_scale.util.text import escaped

if TYPE_CHECKING:
    from livt_scale.data.build.scan import Progress

_log = logging.getLogger(__name__)
MIB = 2**20
EVERY_S = 10.0  # a plain line of progress, where there is no terminal


@contextmanager
def progress_of(unit: str) -> Iterator[Progress]:
    """A bar on a terminal, else a line every EVERY_S seconds; on stderr, so that --json stays JSON."""
    if not sys.stderr.isatty():
        yield _Lines(unit)
        return
    from livt_scale.util.tables import plain_bar

    with plain_bar(unit, "{task.fields[rate]}") as bar:
        tasks: dict[str, Any] = {}
        rate = _Rate(unit)

        def show(name: str, done: int, total: int, num_bytes: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(escaped(name), total=total, rate="")
            bar.update(tasks[name], completed=done, rate=rate(name, done, num_bytes))

        yield show


class _Lines:
    """Progress for a log file."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._rate = _Rate(unit)
        self._logged = time.monotonic()

    def __call__(self, name: str, done: int, total: int, num_bytes: int) -> None:
        rate = self._rate(name, done, num_bytes)
        if time.monotonic() - self._logged >= EVERY_S or done == total:
            self._logged = time.monotonic()
            _log.info("%s: %s of %s %s, %s", name, f"{done:,}", f"{total:,}", self._unit, rate)


class _Rate:
    """Units and MiB a second of the set in work; its clock starts where the set before ended."""

    def __init__(self, unit: str) -> None:
        self._unit, self._name = unit, ""
        self._begun = self._last = time.monotonic()

    def __call__(self, name: str, done: int, num_bytes: int) -> str:
        if name != self._name:
            self._name, self._begun = name, self._last
        self._last = time.monotonic()
        seconds = max(self._last - self._begun, 1e-3)
        return f"{done / seconds:,.0f} {self._unit}/s, {num_bytes / MIB / seconds:,.1f} MiB/s"
