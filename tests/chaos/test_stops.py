"""Requests to stop, by the clock and by signals to one rank of two: saved, exit 85, within a bound, and it goes on."""

from __future__ import annotations

import signal
import time

import pytest

from livt_scale.train.preempt import MIN_LEAD_S
from livt_scale.train.run_files import read_status
from tests.chaos.ranks import Ranks, assert_same_pretraining
from tests.chaos.test_lost_ranks import first_steps_done

SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1)]
STOP_S = 30.0  # a step, a save, a picture, the process's end where many others compute; alone it is 3 s


@pytest.mark.parametrize("number", [signal.SIGUSR2, *SLOW])
def test_a_signal_to_one_rank_stops_both_after_the_same_step(livt, unbroken, number):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, "slow:0.05", checkpoint__every_steps=1000) as ranks:
        ranks.wait_for(lambda: first_steps_done(run_dir))
        ranks.kill(1, number)
        codes, took_s = ranks.ended(within_s=60)
        assert codes == [85, 85], ranks.said(0)
        assert took_s < STOP_S
        assert f"stopped by {number.name} after step" in ranks.said(1)
        assert "stopped by a request to another rank after step" in ranks.said(0)
    assert read_status(run_dir, "pretrain")["state"] == "preempted"
    with Ranks(livt, run_dir, checkpoint__every_steps=1000) as ranks:
        assert ranks.ended(within_s=120)[0] == [0, 0], ranks.said(0)
    assert_same_pretraining(run_dir, unbroken)


@pytest.mark.slow
def test_the_clock_stops_a_run_before_its_time_limit(livt):
    """A save is measured after the third step; until then one is taken for 30 s, twice that is within this limit."""
    run_dir, limit = livt.folder / "run", time.time() + 100
    ends_at = {"SLURM_JOB_END_TIME": f"{limit:.0f}"}
    with Ranks(livt, run_dir, "slow:3", env=ends_at, stages__pretrain__epochs=8) as ranks:  # 216 s of it
        codes, _ = ranks.ended(within_s=100)
        assert codes == [85, 85], ranks.said(0)
        assert "stopped by the clock, " in ranks.said(0)
    left_s = limit - time.time()
    assert MIN_LEAD_S / 2 < left_s < 60
    assert read_status(run_dir, "pretrain")["state"] == "preempted"


def test_a_signal_before_the_first_step_is_kept_until_then(livt):
    run_dir = livt.folder / "run"
    with Ranks(livt, run_dir, world=1) as ranks:
        ranks.wait_for(lambda: (run_dir / "pretrain" / "heartbeats" / "rank-0.json").exists())
        ranks.kill(0, signal.SIGTERM)
        codes, _ = ranks.ended(within_s=60)
    assert codes == [85]
    assert [p.name for p in (run_dir / "pretrain" / "checkpoints").glob("step-*")] == ["step-00000001"]
