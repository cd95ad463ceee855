"""What failures cost a run: Daly's formula for the best interval between saves, and a simulation of the run itself.

    daly_interval_s(10, 86400)      -> 1304 s: a save of 10 s, a failure a day
    simulate(FailingRun(…), seed=0)   -> Lost(total_s=…, …), event by event

The formula assumes failures far apart (many intervals between two) and a restart that is short against that. The
simulation does not: failures also hit restarts and saves, each one waits to be noticed and for the queue, and the work
since the last complete save is done again.

Source: Daly 2006, doi 10.1016/j.future.2004.11.016, equation 37.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that lose least, if a save holds up `save_s` and failures come every `mtbf_s`.

    √(2δM)·(1 + √(δ/2M)/3 + (δ/2M)/9) − δ where δ < 2M, else M.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, save_s: float, *, mtbf_s: float, restart_s: float) -> float:
    """Share of the time that goes to saves, to work done again and to restarts (first order in interval / mtbf)."""
    return save_s / (interval_s + save_s) + (interval_s / 2 + save_s + restart_s) / mtbf_s


@dataclass(frozen=True)
class FailingRun:
    """A run of `work_s` seconds and how it fails: exponentially, every `mtbf_s` seconds on average."""

    work_s: float
    interval_s: float
    save_s: float
    mtbf_s: float
    detect_s: float = 0.0
    requeue_s: float = 0.0
    start_s: float = 0.0


@dataclass(frozen=True)
class Lost:
    """Seconds of a simulated run. share: of the total that was not work done for good."""

    total_s: float
    saves_s: float
    again_s: float
    waits_s: float
    failures: int
    finished: bool = True

    @property
    def share(self) -> float:
        return (self.saves_s + self.again_s + self.waits_s) / self.total_s


def simulate(run: FailingRun, *, seed: int, max_failures: int = 100_000) -> Lost:
    """One run until its work is done, or until it has failed `max_failures` times."""
    draw = random.Random(seed)
    done = now = saves_s = again_s = waits_s = 0.0
    failures = 0
    fails_at = draw.expovariate(1 / run.mtbf_s)
    while done < run.work_s:
        piece = min(run.interval_s, run.work_s - done)
        needed = piece + run.save_s
        if now + needed <= fails_at:
            now, done, saves_s = now + needed, done + piece, saves_s + run.save_s
            continue
        failures += 1
        again_s += fails_at - now  # since the last complete save
        if failures == max_failures:
            return Lost(fails_at, saves_s, again_s, waits_s, failures, finished=False)
        now, wait_s = _restarted(run, draw, fails_at)
        waits_s += wait_s
        fails_at = now + draw.expovariate(1 / run.mtbf_s)
    return Lost(now, saves_s, again_s, waits_s, failures)


def _restarted(run: FailingRun, draw: random.Random, failed_at: float) -> tuple[float, float]:
    """(when training continues, seconds since the failure): a start may fail too, and is then repeated."""
    now = failed_at + run.detect_s
    while True:
        now += run.requeue_s
        until_failure = draw.expovariate(1 / run.mtbf_s)
        if until_failure >= run.start_s:
            return now + run.start_s, now + run.start_s - failed_at
        now += until_failure + run.detect_s
