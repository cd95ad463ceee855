"""The loader processes of one iterator: started, watched and ended.

    with Batches(dataset, loading) as batches:      # loading.workers processes, each with a copy of the dataset
        for batch in batches:
            …

A killed process raises an error at the next batch and never hangs. No process outlives the iterator.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from livt_scale.data.batch import Batch, Blocks, Packed, forget
from livt_scale.data.fork_server import (
    PREEMPTION_SIGNALS,
    before_server_ends,
    fork_context,
    leave_server,
    signals_held_back,
)
from livt_scale.data.num_workers import Loading
from livt_scale.util.errors import DataError, LivtError

END_S = 60.0  # for a killed process to be gone: one in the middle of a read from a file server takes its time
NO_PIDFD = (OSError, AttributeError)  # a kernel before 5.3, a container that forbids it; a Python built without it


class LoaderDataset(Protocol):
    """Iterated in each loader process: yields Packed; after an error, Failed is the last item."""

    blocks: Blocks

    def __iter__(self) -> Iterator[Packed | Failed]: ...


@dataclass(frozen=True)
class Failed:
    """Sent through the pipe instead of a batch: torch would wrap the error in a page of traceback."""

    error: LivtError


class Batches:
    """An iterator of Batch that owns the loader processes; closed by `with`, by `close()` or when it is dropped.

    kept: the processes outlive the last batch, and the next `for` begins with the first one (see `KeptBatches`).
    """

    def __init__(self, dataset: LoaderDataset, loading: Loading, *, kept: bool = False) -> None:
        self.loading = loading
        workers, prefetch = loading.workers, loading.prefetch
        self._kept, self._begun = kept, False
        dataset.blocks = Blocks(keep=prefetch + 2)  # the ready ones, one being filled, one in use
        with warnings.catch_warnings():  # more workers than cores is the recipe's choice; `livt doctor` mentions it
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            self._loader: DataLoader[Any] = DataLoader(
                dataset,  # type: ignore[arg-type]
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                persistent_workers=kept and workers > 0,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_start_worker if workers else None,
                multiprocessing_context=fork_context() if workers else None,
                generator=torch.Generator(),  # else it would draw from torch's global one
            )
            before = set(multiprocessing.active_children())
            with signals_held_back():
                self._packed: Any = iter(self._loader)
        self._workers = [p for p in multiprocessing.active_children() if p not in before]
        self._handles = _handles(self._workers)
        if workers:
            # torch's handler of SIGCHLD raises in whatever line runs when a worker dies, in the middle of a save too.
            # Our workers are taken off its list: a dead one is noticed when the next batch is requested, within 5 s.
            signal_handling._remove_worker_pids(id(self._packed))
            self._packed._worker_pids_set = False  # type: ignore[attr-defined]
        self._close = weakref.finalize(
            self, _stop, self._packed, self._workers, self._handles
        )  # also runs at the interpreter's exit
        before_server_ends(self._close)

    @property
    def is_closed(self) -> bool:
        return not self._close.alive

    def __iter__(self) -> Self:
        if self._kept and self._begun and not self.is_closed:
            self._raise_death(within_s=0)
            try:
                self._packed = iter(self._loader)
            except Exception as error:
                self._raise_death(error)
                raise
            self._begun = False
        return self

    def __next__(self) -> Batch:
        if self.is_closed:
            raise StopIteration
        self._begun = True
        try:
            packed = next(self._packed)
        except StopIteration:
            if self._kept:
                forget(self._workers)
            else:
                self.close()
            raise
        except Exception as error:
            self._raise_death(error)
            raise
        if isinstance(packed, Failed):
            self.close()
            raise packed.error
        return packed if isinstance(packed, Batch) else packed.received().unpack()

    def _raise_death(self, cause: Exception | None = None, *, within_s: float = 1.0) -> None:
        """End all loader processes and raise DataError if one is dead."""
        dead = _first_dead(self._workers, within_s=within_s)
        if dead is not None:
            _kill(self._packed, self._workers, self._handles)
            self.close()
            raise _death(dead) from cause

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes and wait until they are gone."""
        self._close()


class KeptBatches:
    """Passes over the same batches by the same processes, which wait in between and hold no batch then.

    kept = KeptBatches(partial(evaluation_batches, …, kept=True))
    with kept.one_pass() as batches:        # the processes are started, the first time
        for batch in batches: …
    kept.close()
    """

    def __init__(self, make: Callable[[], Batches]) -> None:
        self._make = make
        self._batches: Batches | None = None

    @contextmanager
    def one_pass(self) -> Iterator[Batches]:
        """The batches, from the first one; a pass that is not finished ends the processes."""
        if self._batches is None or self._batches.is_closed:
            self._batches = self._make()
        try:
            yield self._batches
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _start_worker(_: int) -> None:
    """Slurm signals every process of a step. Only the main process decides what a preemption means; when it ends,
    however it ends, its workers do too (`_stop`, `_end_with_main`)."""
    for number in PREEMPTION_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)
    leave_server()
    _end_with_main()


def _end_with_main() -> None:
    """In a loader process: end when the main process is gone, also if it already is.

    torch watches the parent that it finds when the process is ready. A main process that was killed before then is not
    that parent: its loader processes would never end.
    """
    main = multiprocessing.parent_process()
    assert main is not None
    assert main.pid is not None
    try:
        handle = os.pidfd_open(main.pid)
    except ProcessLookupError:
        os._exit(1)
    except NO_PIDFD:
        return
    threading.Thread(
        target=lambda: multiprocessing.connection.wait([handle]) and os._exit(1), name="livt-end-with-main", daemon=True
    ).start()


def _stop(packed: Any, workers: list[Any], handles: list[int]) -> None:
    if workers:
        packed._shutdown_workers()  # torch has no public name for it
    _end(workers, handles)


def _kill(packed: Any, workers: list[Any], handles: list[int]) -> None:
    """After a death. The dead one may hold a lock for ever, so that torch's orderly way could hang: not taken."""
    packed._shutdown = True
    if hasattr(packed, "_pin_memory_thread"):  # on a GPU; it looks at this every 5 s
        packed._pin_memory_thread_done_event.set()
    _end(workers, handles)


def _handles(workers: list[Any]) -> list[int]:
    """A pidfd of each: when the server that forked it is dead, `multiprocessing` takes a living process for ended."""
    found = []
    for process in workers:
        with suppress(ProcessLookupError, *NO_PIDFD):  # the first: it has ended, and its server has noticed
            found.append(os.pidfd_open(process.pid))
    return found


def _end(workers: list[Any], handles: list[int]) -> None:
    """Kill what still runs and wait until all are gone. `handles` is empty afterwards."""
    for handle in handles:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    if not handles:  # all have ended, or there are no pidfds
        for process in workers:
            if process.is_alive():
                process.kill()
    while handles:
        multiprocessing.connection.wait([handles[-1]], timeout=END_S)
        os.close(handles.pop())
    for process in workers:
        process.join()
    forget(workers)


def _first_dead(workers: list[Any], *, within_s: float) -> Any | None:
    """The process that ended, if one did: its connections break a moment before the system calls it ended."""
    ended = multiprocessing.connection.wait([p.sentinel for p in workers], timeout=within_s) if workers else []
    for process in workers:
        if process.sentinel in ended:
            process.join()
            return process
    return None


def _death(process: Any) -> DataError:
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
    return DataError(
        f"a loader process (pid {process.pid}) {how}",
        remedy="SIGKILL: most often the machine ran out of memory; SIGBUS: /dev/shm is full; lower data.workers or "
        "data.prefetch. Run the same command again: it resumes from the last checkpoint",
    )
