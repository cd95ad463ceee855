"""Python processes for tests that start with torch imported: a fork of a server, in place of 8 s of CPU for imports.

    process = Popen(["-m", "livt_scale", "train", …], cwd=folder, env=environ, stdout=PIPE, stderr=PIPE)
    out, err = process.communicate(timeout=240)

One server for each test process and choice of imports, started on first use. It has one thread (torch's pools are per
process and a fork has none of the others' threads), no process group and no CUDA, and runs nothing but imports. Each
child has a session, an environment, arguments, limits and random states like a new process; what it shares with the
others is Python's hash seed. With `ranks`, the child starts that many as `torchrun` does and ends all when one fails.
The server does not import DeepSpeed, which changes torch for the process that does: a run that needs it imports it.

A few tests start the real commands (tests/e2e/test_launchers.py), and tests/test_warm.py compares the two.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from subprocess import DEVNULL, PIPE, CompletedProcess, TimeoutExpired
from typing import IO, Any, NoReturn, Self

REPO = Path(__file__).resolve().parents[1]
IMPORTS = ("livt_scale.train.run", "livt_scale.cli.main", "torch._dynamo", "matplotlib.figure", "matplotlib.pyplot")
MAX_REQUEST = 2**17  # bytes; Linux has 208 KiB for a packet
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
HUGE_PAGE, MADV_COLLAPSE = 2**21, 25
TERMINATE_S = 30.0  # what torchrun leaves the other ranks after one has failed


# --- in the test ---


_START = subprocess.Popen  # a test may put its own in place of it while the server is started


class Popen:
    """What tests use of subprocess.Popen, for `python ARGUMENTS` with -m, -c, -W or the path of a script.

    stdout, stderr: None (the test's own), PIPE, DEVNULL or a file. The process is always the leader of a session.
    max_cpu_s: the system ends it after so many seconds of CPU. max_memory: bytes that it may map, beyond what it has
    as a fork. imports: the modules that the process starts with, one server for each choice.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        ranks: int = 1,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        max_cpu_s: int | None = None,
        max_memory: int | None = None,
        imports: Sequence[str] = IMPORTS,
    ) -> None:
        self.args = [str(word) for word in arguments]
        self.returncode: int | None = None
        self.stdout, out = _output(stdout, sys.__stdout__)
        self.stderr, err = _output(stderr, sys.__stderr__)
        self._status, status = os.pipe()
        options = [
            option
            for _, option in takewhile(lambda pair: pair[0] == "-W", zip(self.args[::2], self.args[1::2], strict=False))
        ]
        request = {
            "arguments": self.args[2 * len(options) :],
            "warnings": options,
            "ranks": ranks,
            "cwd": os.path.abspath(cwd or "."),  # noqa: PTH100  no link is resolved
            "env": dict(os.environ if env is None else env),
            "limits": {limit: resource.getrlimit(limit) for limit in LIMITS},
            "max_cpu_s": max_cpu_s,
            "max_memory": max_memory,
            "cpus": sorted(os.sched_getaffinity(0)),
        }
        try:
            self.pid = _server(tuple(imports)).start(request, [out.fd, err.fd, status])
        finally:
            os.close(status)
            for end in (out, err):
                if end.is_ours:
                    os.close(end.fd)
        self._readers: list[_Reader] = []

    def poll(self) -> int | None:
        return self._await(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._await(timeout) is None:
            raise TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and stderr, and the process's end. After a TimeoutExpired it can be called again."""
        ends = None if timeout is None else time.monotonic() + timeout
        self._readers = self._readers or [_Reader(file) for file in (self.stdout, self.stderr)]
        for reader in self._readers:
            reader.join(None if ends is None else max(ends - time.monotonic(), 0))
            if reader.is_alive():
                raise TimeoutExpired(self.args, timeout or 0)
        self.wait(None if ends is None else max(ends - time.monotonic(), 0))
        return self._readers[0].text, self._readers[1].text

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self.stdout, self.stderr):
            if file is not None:
                file.close()
        self.wait()

    def __del__(self) -> None:
        if self._status >= 0:
            os.close(self._status)

    def _await(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._status, select.POLLIN)
            if poller.poll(None if timeout is None else timeout * 1000):
                data = os.read(self._status, 4)
                assert len(data) == 4, "the server of processes has died"
                self.returncode = os.waitstatus_to_exitcode(struct.unpack("i", data)[0])
                os.close(self._status)
                self._status = -1
        return self.returncode


def run(
    arguments: Sequence[str | Path],
    *,
    check: bool = False,
    timeout: float | None = 600,
    **options: Any,
) -> CompletedProcess[str]:
    """Like subprocess.run with text captured."""
    process = Popen(arguments, **{"stdout": PIPE, "stderr": PIPE, **options})
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    done = CompletedProcess(process.args, process.wait(), out, err)
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{out[-3000:]}\n{err[-3000:]}"
    return done


def run_each(each: Sequence[Sequence[str | Path]], *, timeout: float = 600, log: Path, **options: Any) -> str:
    """Run all of `each` at the same time, with one file for what they print; what they have printed."""
    with log.open("w+") as file:
        processes = [Popen(arguments, stdout=file, stderr=file, **options) for arguments in each]
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    said = log.read_text()
    assert codes == [0] * len(codes), said[-6000:]
    return said


@dataclass
class _End:
    fd: int
    is_ours: bool = True


def _output(where: int | IO[Any] | None, own: IO[Any] | None) -> tuple[IO[str] | None, _End]:
    """The end that the test reads, if it does, and the one that the process writes."""
    if where == PIPE:
        ours, theirs = os.pipe()
        return os.fdopen(ours, encoding="utf-8"), _End(theirs)
    if where == DEVNULL:
        return None, _End(os.open(os.devnull, os.O_WRONLY))
    if where is None:
        assert own is not None
        return None, _End(own.fileno(), is_ours=False)
    return None, _End(where if isinstance(where, int) else where.fileno(), is_ours=False)


class _Reader(threading.Thread):
    def __init__(self, file: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self._file, self.text = file, ""
        self.start()

    def run(self) -> None:
        if self._file is not None:
            with self._file as file:
                self.text = file.read()


class _Server:
    def __init__(self, imports: Sequence[str]) -> None:
        self._lock, self.owner = threading.Lock(), os.getpid()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
        environ |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        with theirs:
            self._process = _START(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno()), *imports],
                cwd=REPO,
                env=environ,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tests, which then end what they have started
            )
        self.pid = self._process.pid
        atexit.register(self._end)

    def _end(self) -> None:
        if self.owner == os.getpid():
            self._socket.close()
            self._process.wait()

    def start(self, request: Mapping[str, Any], files: list[int]) -> int:
        """The process's id, once it has its session."""
        data = json.dumps(request).encode()
        assert len(data) < MAX_REQUEST
        with self._lock:
            socket.send_fds(self._socket, [data], files)
            answer = json.loads(self._socket.recv(MAX_REQUEST) or b'{"error": "the server of processes has died"}')
        if "error" in answer:
            raise OSError(answer["error"])
        return answer["pid"]


_servers: dict[tuple[str, ...], _Server] = {}


def _server(imports: tuple[str, ...]) -> _Server:
    if imports not in _servers or _servers[imports].owner != os.getpid():  # a fork of the tests has none yet
        _servers[imports] = _Server(imports)
    return _servers[imports]


# --- in the server ---


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork for each request until the test process is gone (None). In a child: its request, with its "files"."""
    children: dict[int, tuple[int, int]] = {}  # by pidfd: process id, where its exit status goes
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != requests.fileno():
                    pid, status = children.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _hand_over(os.waitpid(pid, 0)[1], status)
                    continue
                data, files, _, _ = socket.recv_fds(requests, MAX_REQUEST, 3)
                if not data:
                    for pid, _ in children.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"  # noqa: PTH208
                child = os.fork()
                if child == 0:
                    for pidfd, (_, status) in children.items():
                        os.close(pidfd)
                        os.close(status)
                    os.close(files.pop())
                    return {**json.loads(data), "files": files}
                watched = os.pidfd_open(child)
                selector.register(watched, selectors.EVENT_READ)
                children[watched] = (child, files.pop())
                for file in files:
                    os.close(file)


def _hand_over(status: int, file: int) -> None:
    with suppress(BrokenPipeError):  # the test does not ask any more
        os.write(file, struct.pack("i", status))
    os.close(file)


# --- in the child ---


@dataclass
class Imported:
    """What the imported packages have changed in the process: torch sets filters and variables."""

    first_filters: list[Any]
    filters: list[Any]
    environ: dict[str, str]


def prepare(request: Mapping[str, Any], imported: Imported) -> None:
    """Make this fork look like a process that was just started with what the request says."""
    os.setsid()
    os.chdir(request["cwd"])
    os.sched_setaffinity(0, request["cpus"])
    for limit, values in request["limits"].items():
        resource.setrlimit(int(limit), tuple(values))
    for number, file in enumerate(request["files"], start=1):
        os.dup2(file, number)
        os.close(file)
    if request["max_cpu_s"] is not None:
        used_s = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        seconds = int(used_s) + request["max_cpu_s"]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if request["max_memory"] is not None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + request["max_memory"],) * 2)
    os.environ.clear()
    os.environ.update({**imported.environ, **request["env"]})
    time.tzset()
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    _set_path(os.environ.get("PYTHONPATH", ""))
    options = [option for option in os.environ.get("PYTHONWARNINGS", "").split(",") if option]
    _set_warnings([*options, *request["warnings"]], imported)


def _set_path(added: str) -> None:
    path = [entry for entry in sys.path if entry != str(REPO)]
    sys.path[:] = list(dict.fromkeys([*filter(None, added.split(os.pathsep)), *path, str(REPO)]))


def _set_warnings(options: list[str], imported: Imported) -> None:
    """The filters of a new process with these options, and before them those that the imported packages set."""
    warnings.filters[:] = imported.first_filters
    sys.warnoptions[:] = options
    warnings._processoptions(options)  # type: ignore[attr-defined]  what Python calls for -W
    warnings.filters[:0] = imported.filters
    warnings._filters_mutated()  # type: ignore[attr-defined]


def start_ranks(count: int) -> None:
    """Return in each of `count` forks, a rank each; this process then waits for them as torchrun does, and exits."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            return
        ranks.append(pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _signal_all(ranks, number))
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            _end_all(ranks)
            os._exit(1)
    os._exit(0)


def _end_all(ranks: list[int]) -> None:
    signal.signal(signal.SIGALRM, lambda *_: _signal_all(ranks, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, TERMINATE_S)
    _signal_all(ranks, signal.SIGTERM)
    while ranks:
        ranks.remove(os.wait()[0])


def _signal_all(ranks: list[int], number: int) -> None:
    for pid in ranks:
        os.kill(pid, number)


def execute(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does."""
    if arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = type(sys)("__main__")
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    elif arguments[0] == "-m":
        sys.argv[:] = ["-m", *arguments[2:]]
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        assert not arguments[0].startswith("-"), f"{arguments[0]} needs a process of its own"
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def exit_status(arguments: list[str]) -> int:
    """Execute them; what Python would exit with. The traceback of an uncaught error is printed, as Python does."""
    try:
        execute(arguments)
    except SystemExit as asked:
        if asked.code is None or isinstance(asked.code, int):
            return (asked.code or 0) & 0xFF
        print(asked.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def end(status: int) -> NoReturn:
    """What Python does at its end, but for freeing all objects.

    That would copy the pages that this fork shares with the server, which takes 0.6 s of CPU.
    """
    threading._shutdown()  # type: ignore[attr-defined]  waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed by the program, or a pipe that nobody reads
            stream.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def use_huge_pages() -> None:
    """Put the memory of this process into pages of 2 MiB where the system can: a fork copies fewer table entries."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, _, *name = line.split()
        if access == "rw-p" and name in ([], ["[heap]"]):
            start, end = (int(number, 16) for number in span.split("-"))
            for at in range(-(-start // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
                madvise(at, HUGE_PAGE, MADV_COLLAPSE)  # an error leaves small pages there


def main() -> None:
    filters, environ = list(warnings.filters), dict(os.environ)
    requests = socket.socket(fileno=int(sys.argv[1]))
    _set_path(str(REPO))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    sys.modules["livt_scale.cli.main"].command()
    imported = Imported(
        filters,
        [item for item in warnings.filters if item not in filters],
        {name: value for name, value in os.environ.items() if name not in environ},
    )
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch's operators take 50 ms to free what a fork shares with this process
    gc.collect()
    gc.freeze()
    use_huge_pages()
    request = serve(requests)
    if request is None:
        return
    try:
        prepare(request, imported)
    except OSError as error:
        requests.send(json.dumps({"error": str(error)}).encode())
        os._exit(1)
    requests.send(json.dumps({"pid": os.getpid()}).encode())
    requests.close()
    if request["ranks"] > 1:
        start_ranks(request["ranks"])
    end(exit_status(request["arguments"]))


if __name__ == "__main__":
    main()
