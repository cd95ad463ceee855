"""The parts of a step: wall time on CPUs, events on GPUs, read without a wait a step."""

from __future__ import annotations

import time

import pytest
import torch

from livt_scale.train.telemetry import clock as timing
from livt_scale.train.telemetry.clock import PARTS, StepClock


def test_parts_add_up_until_they_are_taken():
    clock, slept = StepClock(torch.device("cpu")), {"forward": 0.0, "data_wait": 0.0}
    for _ in range(2):
        for name, part in (("forward", clock.part), ("data_wait", clock.host)):
            with part(name):
                start = time.perf_counter()
                time.sleep(0.01)
                slept[name] += time.perf_counter() - start
    taken = clock.take()
    assert set(taken) == set(PARTS)
    for name, inside_s in slept.items():
        assert 0.02 <= inside_s <= taken[name] < inside_s + 0.5, name
    assert taken["backward"] == 0
    assert clock.take() == dict.fromkeys(PARTS, 0.0)


class Event:
    """A CUDA event on a GPU that is two steps behind the process."""

    now = 0.0
    behind_s = 6.0
    made = 0
    waits = 0

    def __init__(self, enable_timing):
        assert enable_timing
        Event.made += 1

    def record(self):
        self.at = Event.now

    def query(self):
        return Event.now >= self.at + Event.behind_s

    def synchronize(self):
        Event.waits += 1
        Event.behind_s = 0.0

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


def test_on_a_gpu_events_are_read_late_used_again_and_waited_for_once(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(50):
        for name, seconds in (("forward", 1.0), ("backward", 2.0)):
            with clock.part(name):
                Event.now += seconds
    assert Event.waits == 0
    assert Event.made < 20  # of 200 marks
    taken = clock.take()
    assert Event.waits == 1
    assert taken["forward"] == pytest.approx(50)
    assert taken["backward"] == pytest.approx(100)
