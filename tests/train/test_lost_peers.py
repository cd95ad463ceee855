"""Which heartbeats a rank looks at, and which of them are of a rank that is gone."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace

import pytest

from livt_scale.distributed.world import World
from livt_scale.train import heartbeat, lost_peers, run
from livt_scale.train.heartbeat import Heartbeat
from livt_scale.train.lost_peers import SILENT_S, SLOW_START, LostPeers, lost_error

NOW = time.time() + 3600  # after the tests began, however long others take before them
BEAT = Heartbeat(1, socket.gethostname(), os.getpid(), "running", "step", 12, since=NOW, at=NOW)
ELSEWHERE = replace(BEAT, host="another")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass between looks."""
    seconds = [0.0]
    monkeypatch.setattr(lost_peers.time, "monotonic", lambda: seconds[0])
    return seconds


def looks(clock, peers: LostPeers, *, every_s: float, until_s: float) -> list[Heartbeat]:
    """What is found by looking every `every_s`, until something is or `until_s` have passed."""
    end_s = clock[0] + until_s
    while clock[0] < end_s:
        if lost := peers.look():
            return lost
        clock[0] += every_s
    return []


@pytest.mark.parametrize(
    ("beat", "is_lost"),
    [
        (BEAT, False),
        (replace(BEAT, state="done"), False),
        (replace(BEAT, state="stopped"), False),
        (replace(BEAT, state="failed", why="a damaged sample"), True),
        (replace(BEAT, state="peer_lost", why="rank 5 is gone"), True),
        (replace(BEAT, state="failed", at=NOW - 7200), False),  # of an earlier start
        (replace(BEAT, pid=2**22 + 1), True),  # no process has this number
        (replace(ELSEWHERE, pid=2**22 + 1), False),  # there one may have it
    ],
)
def test_a_rank_is_gone_by_its_report_or_as_its_process_is(tmp_path, beat, is_lost):
    heartbeat.write(tmp_path, beat)
    found = LostPeers(tmp_path, world=World(0, 2), beat_s=5).look()
    assert found == ([beat] if is_lost else [])


def test_a_rank_of_another_host_is_gone_when_its_heartbeat_has_not_changed_for_long(tmp_path, clock):
    heartbeat.write(tmp_path, ELSEWHERE)
    peers = LostPeers(tmp_path, world=World(0, 2), beat_s=5)
    assert looks(clock, peers, every_s=5, until_s=60) == [ELSEWHERE]
    assert SILENT_S < clock[0] <= 20
    heartbeat.write(tmp_path, replace(ELSEWHERE, at=NOW + 20))
    assert peers.look() == []


def test_the_process_of_this_host_that_writes_nothing_is_not_gone(tmp_path, clock):
    heartbeat.write(tmp_path, BEAT)
    assert looks(clock, LostPeers(tmp_path, world=World(0, 2), beat_s=5), every_s=5, until_s=300) == []


def test_a_file_system_that_hung_does_not_make_the_others_silent(tmp_path, clock):
    """A look that took 5 minutes counts as two heartbeats: the others could not write either."""
    heartbeat.write(tmp_path, ELSEWHERE)
    peers = LostPeers(tmp_path, world=World(0, 2), beat_s=5)
    assert looks(clock, peers, every_s=300, until_s=301) == []


def test_the_first_step_may_be_silent_for_longer(tmp_path, clock):
    heartbeat.write(tmp_path, replace(ELSEWHERE, phase="first step"))
    peers = LostPeers(tmp_path, world=World(0, 2), beat_s=5)
    assert looks(clock, peers, every_s=5, until_s=600)
    assert clock[0] > SILENT_S * SLOW_START


def test_progress_makes_earlier_silence_forgotten(tmp_path, clock):
    heartbeat.write(tmp_path, ELSEWHERE)
    peers = LostPeers(tmp_path, world=World(0, 2), beat_s=5)
    assert looks(clock, peers, every_s=5, until_s=15) == []
    peers.forget()
    assert looks(clock, peers, every_s=5, until_s=15) == []


@pytest.mark.parametrize(("rank", "seen"), [(0, [1, 2, 3]), (1, [2]), (2, [3]), (3, [])])
def test_rank_0_looks_at_all_and_each_other_rank_at_the_next_one(tmp_path, rank, seen):
    for other in (1, 2, 3):
        heartbeat.write(tmp_path, replace(BEAT, rank=other, state="failed"))
    heartbeat.write(tmp_path, replace(BEAT, rank=0))
    assert [beat.rank for beat in LostPeers(tmp_path, world=World(rank, 4), beat_s=5).look()] == seen


def test_every_rank_looks_at_rank_0(tmp_path):
    heartbeat.write(tmp_path, replace(BEAT, rank=0, state="peer_lost", why="rank 77 is gone"))
    for rank in (1, 50, 99):
        found = LostPeers(tmp_path, world=World(rank, 100), beat_s=5).look()
        assert lost_error(found).message == "rank 0 ended: rank 77 is gone"


def test_heartbeats_of_an_earlier_start_are_removed(tmp_path):
    heartbeat.clear(tmp_path)  # there are none
    heartbeat.write(tmp_path, replace(BEAT, state="failed"))
    heartbeat.clear(tmp_path)
    assert heartbeat.read(tmp_path, world_size=3) == []


def test_a_rank_that_never_reaches_its_watchdog_is_ended(monkeypatch):
    calls = []
    monkeypatch.setattr(run.faulthandler, "dump_traceback_later", lambda s, exit: calls.append((s, exit)))
    monkeypatch.setattr(run.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    with run._bounded_start(World(), timeout_s=600):
        assert calls == []
    with run._bounded_start(World(0, 2), timeout_s=600):
        assert calls == [(600 + run.START_GRACE_S, True)]
    assert calls[1:] == ["cancelled"]
