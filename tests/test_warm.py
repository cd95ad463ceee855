"""A process forked from the server of tests/warm.py behaves like one that Python has just started."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

STATE = """
import json, os, random, resource, signal, sys, threading, warnings
import livt_scale, numpy, torch
from livt_scale.train import run
print(json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "environ": sorted(os.environ.items()), "first": sys.path[0],
    "package": livt_scale.__file__, "main": __name__, "warnoptions": sys.warnoptions,
    "filters": [str(f) for f in warnings.filters],
    "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
    "threads": threading.active_count(), "torch threads": torch.get_num_threads(),
    "limits": [resource.getrlimit(n) for n in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)],
    "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(), "umask": os.umask(0),
    "distributed": torch.distributed.is_initialized(),
    "deterministic": torch.are_deterministic_algorithms_enabled(), "deepspeed": "deepspeed" in sys.modules,
    "files": sorted(os.listdir("/proc/self/fd"))[:3],
}, indent=0))
"""


@pytest.fixture
def small_files():
    """A limit on a file's size, which processes inherit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_it_has_the_state_of_a_new_process(tmp_path: Path, small_files: None) -> None:
    arguments = ["-W", "error", "-c", STATE, "one", "--two"]
    environ = {**os.environ, "PYTHONPATH": str(warm.REPO), "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    environ["ONLY_HERE"] = "ünïcode\udcff"
    fork = warm.run(arguments, cwd=tmp_path, env=environ, check=True).stdout
    new = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=True, start_new_session=True,
    ).stdout  # fmt: skip
    assert fork.splitlines() == new.splitlines()


def test_random_numbers_differ_between_processes() -> None:
    code = (
        "import random, numpy, torch, uuid; print(random.random(), numpy.random.random(), torch.rand(1), uuid.uuid4())"
    )
    drawn = [warm.run(["-c", code], check=True).stdout.split() for _ in range(3)]
    assert all(len({line[k] for line in drawn}) == 3 for k in range(4))


@pytest.mark.parametrize(
    ("code", "status", "err"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(85)", 85, ""),
        ("import sys; sys.exit('in words')", 1, "in words\n"),
        ("import os; os._exit(7)", 7, ""),
        ("import atexit; atexit.register(print, 'late', flush=True); print('early')", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ],
)
def test_exit_codes_and_output_are_those_of_python(code: str, status: int, err: str) -> None:
    done = warm.run(["-c", code])
    assert (done.returncode, done.stderr) == (status, err)
    assert done.stdout == ("early\nlate\n" if "atexit" in code else "")


def test_an_uncaught_error_ends_with_a_traceback_and_1() -> None:
    done = warm.run(["-c", "{}['missing']"])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'missing'\n")


def test_a_module_and_a_script_run_as_main(tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.write_text("import sys, beside; print(__name__, sys.argv, beside.x)")
    (tmp_path / "beside.py").write_text("x = 1")
    assert warm.run([script, "a"], check=True).stdout == f"__main__ ['{script}', 'a'] 1\n"
    (tmp_path / "module.py").write_text("import sys; print(__name__, __spec__.name, sys.argv[1:])")
    assert warm.run(["-m", "module", "b"], cwd=tmp_path, check=True).stdout == "__main__ module ['b']\n"


def test_signals_and_time_limits() -> None:
    with warm.Popen(["-c", "import time; time.sleep(60)"], stdout=warm.PIPE, stderr=warm.PIPE) as process:
        assert process.poll() is None
        with pytest.raises(warm.TimeoutExpired):
            process.wait(0.05)
        with pytest.raises(warm.TimeoutExpired):
            process.communicate(0.05)
        assert os.getsid(process.pid) == process.pid
        process.terminate()
        assert process.communicate(10) == ("", "")
    assert process.returncode == -signal.SIGTERM
    process.kill()  # nothing, and no error: it has ended


def test_a_folder_that_is_missing_is_an_error_here() -> None:
    with pytest.raises(OSError, match="No such file"):
        warm.Popen(["-c", ""], cwd="/nowhere")


def test_ranks_know_their_places_and_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    code = "import os; print(*[os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')])"
    done = warm.run(["-c", code], ranks=3, check=True)
    assert sorted(done.stdout.splitlines()) == [f"{rank} 3 {rank} 3" for rank in range(3)]
    fails = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(85); time.sleep(60)"
    assert warm.run(["-c", fails], ranks=2, timeout=30).returncode == 1
