"""Environments that other launchers, schedulers and servers make. Cases E1, E2, E4, E5, E6 and E8."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from livt_scale.checkpoint import tensor_file
from livt_scale.checkpoint.foreign.convert import Converted, write_safetensors
from livt_scale.checkpoint.tensor_file import write_torch
from livt_scale.cli import main as cli
from livt_scale.config.recipe import Remote
from livt_scale.data.remote import fetch as remote
from livt_scale.data.remote.fetch import Fetcher
from livt_scale.distributed import rendezvous
from livt_scale.distributed.world import World, _slurm_master, detect
from livt_scale.train import preempt
from livt_scale.train.preempt import time_limit
from livt_scale.util import atomic, log
from livt_scale.util.atomic import LockHeld, file_lock
from livt_scale.util.errors import DataError, LauncherError, RemoteError, UsageError
from livt_scale.util.host_list import expand
from tests.data.remote.flaky_server import FlakyServer

# --- E1: an interactive step, and waits that are announced ---

INTERACTIVE = {
    "SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "localhost",
}  # fmt: skip


@pytest.mark.parametrize(
    "missing", ["SLURM_JOB_NAME", "SLURM_STEP_NUM_TASKS"]
)  # older versions of Slurm lack the latter
def test_e1_an_interactive_step_is_one_process(missing):
    assert detect({k: v for k, v in INTERACTIVE.items() if k != missing}) == World()


def test_e1_the_tasks_of_a_step_count_not_those_of_its_job(monkeypatch):
    step = {**INTERACTIVE, "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    step |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert detect(step) == World(1, 2, 1, 2)
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert log.rank_of_process() == (1, 2)


@pytest.fixture
def lines(monkeypatch, caplog):
    """What the package logs, with waits announced after 0.05 s."""
    for module in (log, atomic, remote):
        monkeypatch.setattr(module, "ANNOUNCE_AFTER_S", 0.05)
    caplog.set_level(logging.INFO, logger="livt_scale")
    return lambda: [record.getMessage() for record in caplog.records]


def test_e1_a_wait_for_other_processes_is_announced(monkeypatch, lines):
    store = dist.HashStore()
    monkeypatch.setattr(rendezvous, "rendezvous", lambda *_, **__: iter([(store, 0, 4)]))
    with pytest.raises(Exception, match="3 of 4 processes"):
        rendezvous.meet(0, 4, timeout_s=0.3)
    assert lines() == ["waiting for the other 3 of 4 processes, up to 0.3 s"]


def test_e1_a_short_wait_is_not_announced(monkeypatch, lines):
    monkeypatch.setattr(log, "ANNOUNCE_AFTER_S", 0.2)
    with log.announced_wait("nobody"):
        pass
    time.sleep(0.3)
    assert lines() == []


def test_e1_a_wait_for_a_lock_is_announced(tmp_path, lines):
    with file_lock(tmp_path / "lock"), pytest.raises(LockHeld):
        file_lock(tmp_path / "lock", wait_s=0.3)
    assert lines() == [
        f"waiting for {tmp_path / 'lock'}, held by process {os.getpid()} on {socket.gethostname()}, up to 0.3 s"
    ]


# --- E2: Slurm's host lists ---


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("rack[1-2]n[1-4]", "rack1n1"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("node[001-002].cluster.local", "node001.cluster.local"),
        ("gpu[7,9-12]x,login", "gpu7x"),
        ("login,gpu[7,9-12]", "login"),
        ("n[0-999999999999]", "n0"),
    ],
)
def test_e2_the_master_is_the_first_node_whatever_the_form_of_the_list(nodes, first):
    assert _slurm_master({"SLURM_STEP_NODELIST": nodes}) == first


@pytest.mark.parametrize("nodes", ["n[1-", "n1-2]", "n[1-2", "n[[1-2]]", "n[a-b]", "n[]", "n[1-2]" * 200, ",a", "a,,b"])
def test_e2_what_is_no_host_list_is_an_error_that_names_it(nodes):
    with pytest.raises(UsageError, match="Slurm's list of nodes") as error:
        _slurm_master({"SLURM_STEP_NODELIST": nodes})
    assert "MASTER_ADDR" in error.value.remedy


WORD = st.text("abcn-.", min_size=1, max_size=4)
RANGE = st.tuples(st.integers(0, 120), st.integers(0, 5), st.integers(1, 4))  # first, more, width


@st.composite
def host_lists(draw):
    """(the list as Slurm compresses it, the names), from the numbers of each bracket: no parser is involved."""
    texts, names = [], []
    for _ in range(draw(st.integers(1, 3))):
        text, choices = draw(WORD), []
        choices.append([text])
        for ranges in draw(st.lists(st.lists(RANGE, min_size=1, max_size=3), max_size=3)):
            shown, numbers = [], []
            for first, more, width in ranges:
                width = max(width, len(str(first)))
                shown.append(f"{first:0{width}}" + (f"-{first + more:0{width}}" if more else ""))
                numbers += [str(k).zfill(width) for k in range(first, first + more + 1)]
            suffix = draw(st.one_of(st.just(""), WORD))
            text += f"[{','.join(shown)}]{suffix}"
            choices += [numbers, [suffix]]
        texts.append(text)
        names += ["".join(parts) for parts in itertools.product(*choices)]
    return ",".join(texts), names


@settings(max_examples=40)
@given(host_lists())
def test_e2_a_list_expands_to_the_names_that_it_was_made_from(made):
    text, names = made
    assert list(expand(text)) == names


# --- E4: a job end time in the past ---


@pytest.mark.parametrize("name", ["LIVT_STOP_AT", "SLURM_JOB_END_TIME"])
@pytest.mark.parametrize("limit", ["0", "-1e300", "1764000000", "five seconds ago"])
def test_e4_an_end_in_the_past_is_reported_and_ignored(name, limit, caplog):
    limit = f"{time.time() - 5:.0f}" if limit == "five seconds ago" else limit
    assert time_limit({name: limit}) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{name} is " in record.getMessage()
    assert "ignored" in record.getMessage()


def test_e4_the_next_source_counts_instead(monkeypatch):
    later = int(time.time()) + 1000
    assert time_limit({"LIVT_STOP_AT": "1", "SLURM_JOB_END_TIME": str(later)}) == later
    ends = {"77": later, "78": 86_400}

    def scontrol(words: list[str], **options: object) -> SimpleNamespace:
        assert words[0] == "scontrol"
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(ends[words[-1]]))
        return SimpleNamespace(stdout=f"JobId={words[-1]} EndTime={end} Deadline=N/A")

    monkeypatch.setattr(preempt.subprocess, "run", scontrol)
    assert time_limit({"SLURM_JOB_END_TIME": "1", "SLURM_JOB_ID": "77"}) == later
    assert time_limit({"SLURM_JOB_ID": "78"}) is None


@pytest.mark.parametrize("limit", ["nan", "inf", "soon"])
def test_e4_an_end_that_is_no_time_is_refused(limit):
    with pytest.raises(UsageError, match="SLURM_JOB_END_TIME"):
        time_limit({"SLURM_JOB_END_TIME": limit})


# --- E5, E6: the launchers of DeepSpeed and accelerate ---


@pytest.mark.parametrize("option", ["--local_rank=1", "--local-rank=1"])
def test_e5_the_local_rank_that_launchers_add_is_accepted(option):
    result = CliRunner().invoke(cli.app, [option, "train", "--help"])
    assert result.exit_code == 0, result.output
    assert "local" not in CliRunner().invoke(cli.app, ["--help"]).output


def test_e5_deepspeed_says_how_many_processes_a_node_has():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
    assert detect(environ) == World(5, 8, 1, 4)


USE_CPU = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_e6_the_keys_of_accelerates_config_file_are_named():
    with pytest.raises(LauncherError, match="use_cpu: true") as error:
        detect(USE_CPU)
    assert "distributed_type: MULTI_GPU" in error.value.remedy
    assert "use_cpu: false" in error.value.remedy
    assert error.value.exit_code == 2


ACCELERATE = ["python", "-m", "accelerate.commands.launch"], ["python", "/venv/bin/accelerate", "launch"]


@pytest.mark.parametrize(
    ("words", "ended"), [*((w, True) for w in ACCELERATE), (["bash"], False), (["python", "accelerated.py"], False)]
)
def test_e6_the_reason_is_the_last_line_since_accelerates_launcher_is_ended_below_it(monkeypatch, capsys, words, ended):
    calls = []
    parent = SimpleNamespace(cmdline=lambda: words, terminate=lambda: calls.append(capsys.readouterr().err))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setattr(sys, "argv", ["livt"])
    monkeypatch.setattr(cli, "command", lambda: lambda **_: detect(USE_CPU))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert [("use_cpu" in printed) for printed in calls] == [True] * ended


# --- E8: servers and full disks ---


@pytest.mark.parametrize("scheme", ["file", "FILE", "File"])
def test_e8_the_scheme_of_a_url_may_be_in_capitals(tmp_path, scheme):
    (tmp_path / "a.tar").write_bytes(b"abc")
    assert Fetcher(f"{scheme}://{tmp_path}", Remote()).fetch("a.tar", tmp_path / "out", most_bytes=3)
    assert (tmp_path / "out").read_bytes() == b"abc"


def test_e8_http_in_capitals_is_http():
    files = Fetcher("HTTP://host/x", Remote(tries=1, connect_timeout_s=1, deadline_s=1))
    with pytest.raises(RemoteError, match="http://host/x"):
        files.fetch("a.tar", Path("/dev/null"), most_bytes=3)


ABSURD = (
    "Fri, 31 Dec 99999999999 23:59:59 GMT", "31 Dec 0000", "Mon, 99 Foo 2020 99:99:99 +9999999", "9" * 5000, "nan",
    "-inf", "1e999", "Fri, 31 Dec 9999 23:59:59 -2359", "\x00", "",
)  # fmt: skip


@pytest.mark.parametrize("text", ABSURD)
def test_e8_an_absurd_retry_after_is_a_number_of_seconds(text):
    error = Exception()
    error.headers = {"Retry-After": text}  # type: ignore[attr-defined]
    assert remote._retry_after(error) >= 0


def test_e8_a_long_wait_before_the_next_try_is_announced(tmp_path, monkeypatch, lines):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FlakyServer(tmp_path, plan=lambda name, before: "503 0.1") as server, pytest.raises(RemoteError):
        Fetcher(server.url, Remote(tries=2)).fetch("a.tar", tmp_path / "out", most_bytes=3)
    assert lines() == ["a.tar: the server answered 503; try 2 in 0 s"]


FULL_DISK = Path("/dev/full")


@pytest.mark.skipif(not FULL_DISK.exists(), reason="no /dev/full")
def test_e8_torchs_writer_says_that_the_disk_is_full(tmp_path):
    class OnFullDisk(tensor_file.HashedFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self._file.close()
            self._file = FULL_DISK.open("wb", buffering=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "HashedFile", OnFullDisk)
        with pytest.raises(OSError, match="No space left"):
            write_torch({"model": {"w": torch.zeros(1000)}}, tmp_path / "x.pth")


def test_e8_a_full_disk_is_one_line_where_tensors_are_written(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(DataError, match="not enough space") as error:
        write_safetensors(Converted("x", {"model.w": torch.zeros(10)}), tmp_path / "x.safetensors")
    assert "40 bytes needed" in error.value.message
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
