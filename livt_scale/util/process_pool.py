"""One function over many jobs in several processes, results as they come, errors as they were raised.

Processes are spawned, not forked: the caller may hold threads (a progress bar, a training loop). A child whose parent
is gone ends by itself, and a child that is killed is an error, never a wait without end.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from livt_scale.util.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Cores that this process may run on, which a batch system or `taskset` can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    num_jobs: int,
    prepare: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Result]]:
    """(number of the job, its result) in the order of ending. `work` is a function of a module; jobs are pickled.

    The first error ends it: jobs that wait are dropped, those under way are waited for. With one worker or one job
    all is done in this process. `prepare` is called in each other process before its first job is unpickled.
    """
    workers = min(workers, num_jobs)
    numbered = enumerate(jobs)
    if workers <= 1:
        for number, job in numbered:
            yield number, work(job)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(), prepare))
    try:
        yield from _results(pool, work, numbered, num_waiting=2 * workers)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed (often: out of memory)", remedy="give the command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _results(
    pool: ProcessPoolExecutor,
    work: Callable[[Job], Result],
    numbered: Iterator[tuple[int, Job]],
    *,
    num_waiting: int,
) -> Iterator[tuple[int, Result]]:
    open_jobs: dict[Future[Result], int] = {}  # few at a time: a job can be megabytes
    while True:
        for number, job in islice(numbered, num_waiting - len(open_jobs)):
            open_jobs[pool.submit(work, job)] = number
        if not open_jobs:
            return
        for future in wait(open_jobs, return_when=FIRST_COMPLETED).done:
            yield open_jobs.pop(future), future.result()


def _begin(parent: int, prepare: Callable[[], None] | None) -> None:
    _end_with_parent(parent)
    if prepare is not None:
        prepare()


def _end_with_parent(parent: int) -> None:
    """A pool's process waits for jobs for ever when its parent is killed: watch for that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
