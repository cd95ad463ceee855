"""A process that forks the loader processes: it is forked from a rank before there are threads of gloo, NCCL or CUDA.

    with fork_server():                    # before the process group is made
        DataLoader(…, multiprocessing_context=fork_context())       # at any time: forked from the server

A fork copies one thread. What another thread holds at that moment, such as a lock of NCCL or of the driver, stays
locked in the child. The server waits with everything imported and one thread, so that it can fork at any time.

It is the standard library's server (`multiprocessing.forkserver`), but forked: the library starts a new interpreter,
which would import torch again for each rank (about 4 s of CPU and 250 MB) and run a user's script a second time. Python
3.14 authenticates its clients; there, and after the death of ours, the library's way of starting is used.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker, spawn
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

# Slurm sends them to every process of a step, and a terminal SIGINT to every process that it started
PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_library: Any = forkserver._forkserver
_runs_in: int | None = None  # the process that has a server
_at_end: list[Callable[[], object]] = []


@contextmanager
def fork_server() -> Iterator[None]:
    """Within the block, `fork_context` gives the server's. It ends with the block, or with this process."""
    global _runs_in
    if getattr(_library, "_forkserver_pid", None) is not None:  # the user's own
        yield
        return
    _start()
    _runs_in = os.getpid()
    try:
        yield
    finally:
        _runs_in = None
        while _at_end:
            _at_end.pop()()
        with suppress(ProcessLookupError, ChildProcessError):  # it was killed, and another has been waiting for it
            os.kill(_library._forkserver_pid, signal.SIGKILL)  # else `_stop` would wait for processes that hold it open
            _library._stop()


def before_server_ends(close: Callable[[], object]) -> None:
    """`close` ends processes of the server; it may be called more than once. No effect without a server."""
    if _runs_in == os.getpid():
        _at_end.append(close)


def fork_context() -> BaseContext | None:
    """For a DataLoader: the server's context; None without a server, as where a process forks directly."""
    return multiprocessing.get_context("forkserver") if _runs_in == os.getpid() else None


def leave_server() -> None:
    """In a process that was forked by the server: do not keep the server alive after the main process."""
    if forkserver.get_inherited_fds() is not None and _library._forkserver_alive_fd is not None:
        os.close(_library._forkserver_alive_fd)
        _library._forkserver_alive_fd = None


def _start() -> None:
    """What `ForkServer.ensure_running` does, with a fork in place of a new interpreter."""
    with signals_held_back():  # the tracker keeps them blocked: a signal to the step does not end it
        resource_tracker.ensure_running()
    if hasattr(_library, "_forkserver_authkey"):
        _library.set_forkserver_preload(["livt_scale.data.loader"])
        _library.ensure_running()
        return
    with socket.socket(socket.AF_UNIX) as listener, signals_held_back():
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        for stream in (sys.stdout, sys.stderr):  # what waits in them would be written by each process
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        pid = os.fork()
        if pid == 0:
            os.close(alive_w)
            _serve(os.dup(listener.fileno()), alive_r)
        os.close(alive_r)
    _library._forkserver_address, _library._forkserver_alive_fd, _library._forkserver_pid = address, alive_w, pid


@contextmanager
def signals_held_back() -> Iterator[None]:
    """A process that is started inside begins with the signals of a preemption blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTION_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(listener: int, alive: int) -> NoReturn:
    """In the server. It ends when the last process that holds the other end of `alive` has ended."""
    code = 1
    try:
        for number in PREEMPTION_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTION_SIGNALS)
        # A child runs the main module again unless it is the one that it finds here, under the path that it is sent.
        main = spawn.get_preparation_data("loader").get("init_main_from_path")
        if main is not None:
            sys.modules["__main__"].__file__ = main
        forkserver.main(listener, alive, [])
    except SystemExit:
        code = 0
    finally:
        os._exit(code)
