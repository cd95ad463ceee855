"""Which rank is named as slow."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import pytest

from livt_scale.distributed.collectives import Peers
from livt_scale.train.telemetry.clock import DEVICE_PARTS
from livt_scale.train.telemetry.rank_times import AGAIN, LASTING_S, LINES, RankTimes, straggler


@dataclass(frozen=True)
class FakePeers:
    """Rank 0 of several; the others have sent `others`."""

    others: tuple[float, ...]

    def gather(self, value: tuple[float, str]) -> list[tuple[float, str]]:
        return [value, *((seconds, f"host{rank}") for rank, seconds in enumerate(self.others, start=1))]


def sums(own_s: float, *, step_s: float = 1.0, steps: int = 4) -> dict[str, float]:
    """Of an interval of a rank that works `own_s` of each step, and waits for the others in the backward pass."""
    parts = {f"{part}_s": 0.0 for part in DEVICE_PARTS}
    return {**parts, "backward_s": (step_s - own_s) * steps, "step_s": step_s * steps, "steps": steps}


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def warnings_of(
    caplog, clock: list[float], intervals: list[tuple[float, ...]], *, each_s: float = LASTING_S
) -> list[tuple[int, Any]]:
    """(number of the line, rank that is named) for the ranks' times in each interval of `each_s` seconds."""
    times, named = RankTimes(Peers(), stage="pretrain", lockstep=False), []
    for number, (own_s, *others) in enumerate(intervals, start=1):
        clock[0] += each_s
        caplog.clear()
        times.peers = FakePeers(tuple(others))  # type: ignore[assignment]
        with caplog.at_level(logging.WARNING, logger="livt_scale"):
            times.exchange(sums(own_s))
        named += [(number, record.args[1]) for record in caplog.records]
    return named


def test_a_line_has_the_least_the_median_and_the_most_time_and_whose_it_is():
    times = RankTimes(FakePeers((0.3, 0.5, 0.2)), stage="pretrain", lockstep=False)  # type: ignore[arg-type]
    assert times.exchange(sums(0.25)) == {
        "rank_min_s": 0.2,
        "rank_median_s": 0.25,
        "rank_max_s": 0.5,
        "slowest_rank": 2,
        "slowest_host": "host2",
    }


def test_a_forward_pass_with_collectives_does_not_count():
    of_forward = {**sums(0.25), "forward_s": 0.8}  # of four steps
    for lockstep, own_s in ((False, 0.25), (True, 0.05)):
        times = RankTimes(FakePeers((0.1,)), stage="pretrain", lockstep=lockstep)  # type: ignore[arg-type]
        line = times.exchange(of_forward)
        assert sorted((line["rank_min_s"], line["rank_max_s"])) == pytest.approx(sorted((own_s, 0.1)))


def test_equal_ranks_give_no_line(caplog, clock):
    assert not warnings_of(caplog, clock, [(0.25, 0.25, 0.26)] * 10)
    assert not warnings_of(caplog, clock, [(0.25, 0.25)] * 10)


def test_a_rank_is_named_once_it_has_been_slow_for_some_lines_and_much_later_again(caplog, clock):
    assert warnings_of(caplog, clock, [(0.25, 0.25, 0.4)] * (2 * AGAIN)) == [(LINES, 2), (LINES + AGAIN, 2)]
    assert warnings_of(caplog, clock, [(0.9, 0.4)] * LINES) == [(LINES, 0)]


def test_seconds_are_not_enough(caplog, clock):
    lines = [(0.25, 0.25, 0.4)] * 20
    assert not warnings_of(caplog, clock, lines, each_s=LASTING_S / 20)
    assert warnings_of(caplog, clock, lines, each_s=LASTING_S / 10) == [(11, 2)]


def test_ranks_that_are_slow_in_turn_are_not_named(caplog, clock):
    assert not warnings_of(caplog, clock, [(0.25, 0.25, 0.4), (0.25, 0.4, 0.25)] * 5)
    assert not warnings_of(caplog, clock, [(0.25, 0.25, 0.4), (0.25, 0.25, 0.4), (0.25, 0.25, 0.25)] * 5)


def test_a_time_that_is_small_beside_the_step_names_nobody():
    assert straggler([0.001, 0.01, 0.001], step_s=1.0) is None
    assert straggler([0.001, 0.1, 0.001], step_s=1.0) == 1
    assert straggler([0.0, 0.0], step_s=1.0) is None
