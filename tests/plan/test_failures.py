"""Daly's formula against its neighbours and against the simulated run, where it holds and where it does not."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from livt_scale.plan.stage_plan import daly_interval_s, lost_share
from tests.scripts import load_script

SCALE = load_script(Path(__file__).resolve().parents[2] / "benchmarks" / "scale.py")
FailingRun, simulate = SCALE.FailingRun, SCALE.simulate


@pytest.mark.parametrize(("save_s", "mtbf_s"), [(1, 1e4), (30, 1e5), (300, 1e5)])
def test_dalys_interval_loses_less_than_its_neighbours(save_s, mtbf_s):
    best = daly_interval_s(save_s, mtbf_s)
    least, *others = (lost_share(best * k, save_s, mtbf_s=mtbf_s, restart_s=60) for k in (1, 0.7, 1.4))
    assert least < min(others)


def simulated(run, runs=20):
    return statistics.mean(simulate(run, seed=seed).share for seed in range(runs))


def test_the_simulation_agrees_with_the_formula_where_failures_are_far_apart():
    mtbf_s, save_s, start_s = 1e5, 10, 60
    run = FailingRun(3e6, daly_interval_s(save_s, mtbf_s), save_s, mtbf_s, start_s=start_s)
    formula = lost_share(run.interval_s, save_s, mtbf_s=mtbf_s, restart_s=start_s)
    assert simulated(run) == pytest.approx(formula, rel=0.1)


def test_the_formula_does_not_hold_where_restarts_are_as_long_as_failures_are_apart():
    """It counts failures against the work alone, so that its share may exceed 1; a run's cannot."""
    mtbf_s, save_s = 1200, 60
    run = FailingRun(5e4, daly_interval_s(save_s, mtbf_s), save_s, mtbf_s, detect_s=120, requeue_s=600, start_s=300)
    formula = lost_share(run.interval_s, save_s, mtbf_s=mtbf_s, restart_s=120 + 600 + 300)
    assert formula > 1 > simulated(run, runs=5) > 0.5


def test_a_run_without_failures_loses_its_saves():
    lost = simulate(FailingRun(1000, 100, 10, 1e12), seed=0)
    assert (lost.failures, lost.saves_s, lost.total_s) == (0, 100, 1100)


def test_the_parts_of_a_simulated_run_add_up_and_the_same_seed_gives_the_same_run():
    run = FailingRun(1e5, 1000, 10, 5000, detect_s=30, requeue_s=60, start_s=90)
    lost = simulate(run, seed=3)
    assert lost.finished
    assert lost.total_s == pytest.approx(run.work_s + lost.saves_s + lost.again_s + lost.waits_s)
    assert lost == simulate(run, seed=3)


def test_a_run_that_never_reaches_a_save_ends_after_so_many_failures():
    lost = simulate(FailingRun(1e6, 1e5, 10, 100), seed=0, max_failures=50)
    assert not lost.finished
    assert lost.failures == 50
