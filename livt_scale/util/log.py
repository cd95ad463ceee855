"""Progress and warnings on stderr, through `logging`; results go to stdout, which stays clean for `--json`.

    _log = logging.getLogger(__name__)              # in any module: livt_scale.checkpoint.saver
    _log.info("pretrain: 5.4 M parameters")         # rank 0 alone: "pretrain: 5.4 M parameters"
    _log.warning("the disk is full")                # any rank: "livt: warning on rank 3: the disk is full"
    _log.info("profile written", extra=EVERY_RANK)  # any rank: "rank 3: profile written"

    to_stderr()              20:14:03 pretrain: 5.4 M parameters         with the date where stderr is no terminal
    to_file(RUN/log.txt)     2026-11-29 20:14:03 pretrain: 5.4 M parameters

The package installs no handler by itself: the command line does, with `to_stderr`, and a program that imports the
package configures the logger `livt_scale` as it likes. `livt logs --rank 3` looks for the "rank 3:" of these lines.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from livt_scale.util.text import escaped

_log = logging.getLogger(__name__)

ROOT = "livt_scale"
FILE_ONLY = {"file_only": True}  # as `extra`: a line for log.txt, whose content the terminal shows otherwise
EVERY_RANK = {"every_rank": True}  # as `extra`: an INFO line that every rank prints
# rank and number of ranks, by torchrun, mpirun and srun; the first pair that is set counts, as in distributed/world.py
VARIABLES = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)
DATE_AND_TIME = "%Y-%m-%d %H:%M:%S"
ANNOUNCE_AFTER_S = 2.0  # a wait that takes longer is announced


@contextmanager
def announced_wait(what: str, *, every_rank: bool = False) -> Iterator[None]:
    """Log "waiting for `what`" if the block, which waits for others, takes more than ANNOUNCE_AFTER_S."""
    timer = threading.Timer(
        ANNOUNCE_AFTER_S, _log.info, ("waiting for %s", what), {"extra": {"every_rank": every_rank}}
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def to_stderr(*, debug: bool = False) -> Iterator[None]:
    """Print the package's log while the block runs: INFO and above, with `debug` everything."""
    logger = logging.getLogger(ROOT)
    if any(isinstance(handler, RankHandler) for handler in logger.handlers):
        yield
        return

    before = logger.level, logger.propagate
    handler = RankHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False  # a library that configures the root logger would print every line a second time
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class OneLine(logging.Formatter):
    """A message is one line: a newline or an escape sequence in it came from a name, and is escaped."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))


class RankHandler(logging.Handler):
    """Lines on stderr: below WARNING from rank 0 alone, the others with their rank."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(OneLine())

    def filter(self, record: logging.LogRecord) -> bool:
        wanted = record.levelno >= logging.WARNING or getattr(record, "every_rank", False) or rank_of_process()[0] == 0
        return wanted and not getattr(record, "file_only", False) and bool(super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        at = time.localtime(record.created)
        clock = time.strftime("%H:%M:%S" if sys.stderr.isatty() else DATE_AND_TIME, at)
        return f"{clock} {_with_rank(record, super().format(record))}"

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Looked up each time: a progress bar replaces sys.stderr to print lines above itself.
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """Lines at the end of a file. If the disk is full, that is logged once, and the lines are missing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(OneLine())
        self._failed = False

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime(DATE_AND_TIME, time.localtime(record.created))
        return f"{clock} {_with_rank(record, super().format(record))}"

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's signature
        if not self._failed:
            self._failed = True
            _log.warning("%s cannot be written: %s; lines are missing there", self.baseFilename, sys.exc_info()[1])


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append the package's log to `path` while the block runs, and at its end the error that ended it.

    Anything else than a regular file there is left alone, and so is a file that cannot be opened: that is logged.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        handler = LogFile(path)
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror)
        yield
        return

    logger = logging.getLogger(ROOT)
    logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        kind, text = logging.ERROR, str(error) or type(error).__name__
        handler.handle(logging.LogRecord(ROOT, kind, __file__, 0, "%s", (text,), None))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # a full disk was logged
            handler.close()


def _with_rank(record: logging.LogRecord, text: str) -> str:
    if record.levelno >= logging.WARNING:
        return line(record.levelname.lower(), text)
    rank, world_size = rank_of_process()
    return f"rank {rank}: {text}" if getattr(record, "every_rank", False) and world_size > 1 else text


class DiskWarning:
    """Warns once that something cannot be written, and that training continues without it; then is silent.

    warn = DiskWarning("pictures are missing")
    warn(path, error)
    """

    def __init__(self, consequence: str) -> None:
        self._consequence, self._was_given = consequence, False

    def __call__(self, path: Path, error: OSError) -> None:
        if not self._was_given:
            self._was_given = True
            why = error.strerror or error
            _log.warning("%s cannot be written: %s; training continues, %s", path, why, self._consequence)


def line(kind: str, text: str) -> str:
    """`livt: error: …`, among several processes `livt: error on rank 3: …`."""
    rank, world_size = rank_of_process()
    return f"livt: {kind} on rank {rank}: {text}" if world_size > 1 else f"livt: {kind}: {text}"


def rank_of_process() -> tuple[int, int]:
    """(rank, number of ranks) by the launcher's variables; (0, 1) without a launcher or if they are not numbers."""
    for names in VARIABLES:
        values = [os.environ.get(name, "") for name in names]
        if all(value.isdecimal() for value in values):
            return int(values[0]), int(values[1])
    return 0, 1
