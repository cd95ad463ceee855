"""Heartbeats, their reader, and what a watchdog makes of errors. What ends processes is in tests/chaos."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

from livt_scale.config.recipe import Faults
from livt_scale.distributed.world import World
from livt_scale.train import heartbeat
from livt_scale.train import watchdog as watchdog_module
from livt_scale.train.heartbeat import Heartbeat
from livt_scale.train.run_dir import Status
from livt_scale.train.watchdog import SLOW_TIMES, Watchdog
from livt_scale.util.errors import Preempted, RankLostError, SampleError
from tests import warm
from tests.train.loops import a_step, idle_loop, take

BEAT = Heartbeat(0, socket.gethostname(), os.getpid(), "running", "step", 12, since=100.0, at=103.0)
GONE = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:5043"


def watchdog(folder, *, rank=0, world=2, status=None, **faults) -> Watchdog:
    status = status or Status(folder, stage="pretrain", writes=rank == 0)
    faults = Faults(**{"heartbeat_s": 0.05, **faults})
    return Watchdog(folder, status, world=World(rank, world), faults=faults, timeout_s=60)


@contextmanager
def closing(call):
    try:
        yield
    finally:
        call()


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_was_written_is_read_and_what_is_not_whole_is_not(tmp_path):
    heartbeat.write(tmp_path, BEAT)
    heartbeat.write(tmp_path, replace(BEAT, rank=2, step=11))
    folder = tmp_path / "heartbeats"
    (folder / "rank-1.json").write_text('{"rank": 1, "ho')
    (folder / "rank-3.json").write_text('{"another": "form"}')
    assert heartbeat.read(tmp_path, world_size=4) == [BEAT, replace(BEAT, rank=2, step=11)]
    assert heartbeat.read(tmp_path, world_size=1) == [BEAT]


def test_a_heartbeat_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "heartbeats").write_text("a file where the folder would be")
    heartbeat.write(tmp_path, BEAT)
    assert heartbeat.read(tmp_path, world_size=1) == []


def test_the_straggler_is_the_rank_with_fewer_steps_or_longer_in_its_phase():
    beats = [
        BEAT,
        replace(BEAT, rank=1, phase="data", since=99.0),
        replace(BEAT, rank=2, state="failed", step=3),
        replace(BEAT, rank=3, at=110.0),
    ]
    told = heartbeat.summary(beats)
    assert told["slowest"] == {"rank": 1, "host": BEAT.host, "phase": "data", "for_s": 4.0}
    assert (told["count"], told["min_step"], told["max_step"], told["oldest_s"]) == (4, 3, 12, 7.0)
    assert heartbeat.slowest([*beats, replace(BEAT, rank=4, step=11)]).rank == 4
    assert heartbeat.summary([]) == {"count": 0}


def test_only_a_process_of_this_host_is_known_to_be_dead():
    pid = dead_process()
    assert replace(BEAT, pid=pid).is_dead
    assert not replace(BEAT, pid=pid, host="another").is_dead
    assert not BEAT.is_dead


def test_a_running_rank_writes_where_it_is_and_status_joins_the_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog_module, "STATUS_EVERY_S", 0.05)
    heartbeat.write(tmp_path, replace(BEAT, rank=1, phase="data", step=4))
    status_file = Status(tmp_path, stage="pretrain", writes=True)
    watched = watchdog(tmp_path, status=status_file)
    with watched:
        status_file.write("running", step=0)
        watched.at("step", 5)
        deadline = time.monotonic() + 20
        while (status := json.loads((tmp_path / "status.json").read_text())).get("ranks", {}).get("max_step") != 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert status["state"] == "running"
        assert (status["step"], status["ranks"]["min_step"]) == (5, 4)
        assert status["ranks"]["slowest"]["rank"] == 1
        beat = heartbeat.read(tmp_path, world_size=1)[0]
        assert (beat.phase, beat.step, beat.pid, beat.state) == ("step", 5, os.getpid(), "running")
    assert heartbeat.read(tmp_path, world_size=1)[0].state == "done"
    assert not (tmp_path / "stacks").exists()


def test_waiting_for_data_is_a_phase_of_its_own_after_the_first_step(tmp_path):
    seen = []

    def batches():
        while True:
            seen.append(watched.phase)
            yield len(seen)

    watched = watchdog(tmp_path)
    loop = idle_loop(watched)
    watched.at_start(loop)
    taken = watched.waits_seen(batches())
    take(loop, a_step(1))
    assert next(taken) == 1
    take(loop, a_step(2))
    assert [next(taken), next(taken)] == [2, 3]
    assert seen == ["first step", "data", "data"]
    assert watched.phase == "step"


STOPPED = """
import sys, time
from pathlib import Path
from livt_scale.config.recipe import Faults
from livt_scale.distributed.world import World
from livt_scale.train import watchdog
from livt_scale.train.run_dir import Status
watchdog.LOCKED_S = watchdog.DUMP_S = 0.0
folder, faults = Path(sys.argv[1]), Faults(heartbeat_s=0.05, stall_timeout_s=float(sys.argv[2]))
status = Status(folder, stage="pretrain", writes=True)
with watchdog.Watchdog(folder, status, world=World(), faults=faults, timeout_s=60) as it:
    it.at("step", 1)
    print("ready", flush=True)
    for _ in range(10):
        time.sleep(0.1)
"""


def test_time_in_which_the_process_was_stopped_is_not_counted(tmp_path):
    bound_s = 3.0
    process = warm.Popen(["-c", STOPPED, tmp_path, str(bound_s)], stdout=warm.PIPE, stderr=warm.PIPE)
    assert process.stdout.readline()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(bound_s + 0.5)
    os.kill(process.pid, signal.SIGCONT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")
    assert not (tmp_path / "stacks").exists()


def test_slow_phases_have_a_longer_bound(tmp_path):
    watched = watchdog(tmp_path, stall_timeout_s=10)
    assert watched.bound_s("step") == watched.bound_s("data") == 10
    assert watched.bound_s("evaluation") == watched.bound_s("first step") == 10 * SLOW_TIMES
    assert watchdog(tmp_path).bound_s("step") == pytest.approx(54)  # before a collective's own 60


@pytest.mark.parametrize(
    ("error", "state"), [(SampleError("a key: not an image"), "failed"), (Preempted("stopped by SIGTERM"), "stopped")]
)
def test_an_own_error_is_in_the_heartbeat_before_connections_close_and_is_raised_as_it_is(tmp_path, error, state):
    def connections_close() -> None:
        beat = heartbeat.read(tmp_path, world_size=1)[0]
        assert (beat.state, beat.why, beat.phase) == (state, error.message, "ending")
        closed.append(beat)

    closed = []
    watched = watchdog(tmp_path)
    with pytest.raises(type(error)), watched, watched.errors_told(), closing(connections_close), watched.errors_told():
        raise error
    assert len(closed) == 1


def test_a_lost_connection_names_the_rank_that_failed_and_its_error(tmp_path):
    heartbeat.write(tmp_path, replace(BEAT, rank=0, state="peer_lost"))
    heartbeat.write(tmp_path, replace(BEAT, rank=2, state="failed", why="shard x.tar: damaged"))
    with (
        pytest.raises(RankLostError, match=r"^rank 2 stopped: shard x\.tar: damaged\. Start the run again"),
        watchdog(tmp_path, rank=1, world=3) as watched,
        watched.errors_told(),
    ):
        raise RuntimeError(GONE)
    assert heartbeat.read(tmp_path, world_size=2)[1].state == "peer_lost"
    assert GONE in (tmp_path / "stacks" / "rank-1.txt").read_text()


def test_a_lost_connection_names_the_rank_whose_process_is_gone_and_rank_1_writes_the_status(tmp_path):
    heartbeat.write(tmp_path, replace(BEAT, pid=dead_process(), at=time.time() - 4))
    status = Status(tmp_path, stage="pretrain", writes=False)
    watched = watchdog(tmp_path, rank=1, status=status)
    with (
        pytest.raises(RankLostError, match=r"rank 0 is gone: last seen at step 12 \(step\), 4 s ago, process \d+ on"),
        status.told(),
        watched,
        watched.errors_told(),
    ):
        raise RuntimeError(GONE)
    assert "rank 0 is gone" in json.loads((tmp_path / "status.json").read_text())["why"]


def test_on_another_host_the_rank_that_writes_no_more_is_the_one_that_is_gone(tmp_path):
    for rank in (1, 2):
        heartbeat.write(tmp_path, replace(BEAT, rank=rank, host="another"))
    alive = watchdog(tmp_path, rank=2, world=3)
    with (
        pytest.raises(RankLostError, match=r"^rank 1 is gone: last seen at step 12 \(step\), \d+ s ago, process"),
        watchdog(tmp_path, rank=0, world=3) as watched,
        alive,
        watched.errors_told(),
    ):
        raise RuntimeError(GONE)


def test_a_runtime_error_that_is_not_about_ranks_is_an_own_one(tmp_path):
    with pytest.raises(RuntimeError, match="CUDA out of memory"), watchdog(tmp_path) as watched, watched.errors_told():
        raise RuntimeError("CUDA out of memory")
    assert heartbeat.read(tmp_path, world_size=1)[0].why == "RuntimeError: CUDA out of memory"
