"""How long each rank works in a step outside of collectives, and which rank the others wait for.

    times = RankTimes(world.peers, stage="pretrain", lockstep=False)
    times.exchange(sums)      # on all ranks at the end of an interval; on rank 0
    {"rank_min_s": 0.1, "rank_median_s": 0.1, "rank_max_s": 0.21, "slowest_rank": 3, "slowest_host": "gpu07"}

All steps take as long as the slowest rank's: the others wait for it in collectives. So a rank's time is that of its
step without the parts that have collectives: backward pass, agreement, optimizer, and the forward pass of a strategy
that gathers parameters there. A slow GPU shows in the forward pass, a slow disk in the wait for data.

The ranks exchange it with the lines of metrics.jsonl alone, over gloo, when the host has waited for the GPU anyway.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from livt_scale.distributed.collectives import Peers

FACTOR = 1.2  # a straggler's time over the median; GPUs of one kind differ by some per cent
SHARE = 0.05  # and at least this part of the step: a wait for data of 2 ms after one of 1 ms costs nothing
LINES = 3  # of metrics.jsonl in a row
LASTING_S = 60.0  # and for as long: any process is held up for some seconds now and then
AGAIN = 100  # lines after which the same straggler is logged again
_log = logging.getLogger(__name__)


@dataclass
class RankTimes:
    """The exchange of one stage. lockstep: the strategy's forward pass has collectives."""

    peers: Peers
    stage: str
    lockstep: bool
    _slow: int | None = field(default=None, init=False)  # who was a straggler in the last line
    _lines: int = field(default=0, init=False)  # for how many lines
    _since: float = field(default=0.0, init=False)  # time.monotonic() of the first of them
    _logged: int = field(default=0, init=False)  # after how many of them the rank was named

    def exchange(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Fields of a line of metrics.jsonl, on rank 0; {} elsewhere. `sums`: seconds of parts, and `steps`."""
        shared = ("backward", "agree", "optimizer", *(("forward",) if self.lockstep else ()))
        own_s = max(sums["step_s"] - sum(sums[f"{part}_s"] for part in shared), 0.0) / sums["steps"]
        ranks = self.peers.gather((own_s, socket.gethostname()))
        if ranks is None:
            return {}
        times = [seconds for seconds, _ in ranks]
        slowest = max(range(len(times)), key=times.__getitem__)
        median_s, host = statistics.median_low(times), ranks[slowest][1]
        if self._is_due(times, step_s=sums["step_s"] / sums["steps"]):
            _log.warning(
                "%s: all ranks wait for rank %d on %s: %.4f s of a step outside of collectives in %d lines in a row; "
                "the median of %d ranks is %.4f s. To measure each rank's device: livt doctor --bench",
                self.stage, slowest, host, times[slowest], self._lines, len(times), median_s,
            )  # fmt: skip
        seconds = {"rank_min_s": min(times), "rank_median_s": median_s, "rank_max_s": times[slowest]}
        return {
            **{name: round(value, 6) for name, value in seconds.items()},
            "slowest_rank": slowest,
            "slowest_host": host,
        }

    def _is_due(self, times: list[float], *, step_s: float) -> bool:
        """Whether to log a straggler now."""
        slow = straggler(times, step_s=step_s)
        if slow != self._slow:
            self._slow, self._lines, self._logged, self._since = slow, 0, 0, time.monotonic()
        self._lines += 1
        if slow is None or self._lines < LINES or time.monotonic() - self._since < LASTING_S:
            return False
        is_due = not self._logged or self._lines - self._logged >= AGAIN
        self._logged = self._lines if is_due else self._logged
        return is_due


def straggler(times: list[float], *, step_s: float) -> int | None:
    """The rank that holds up a step of `step_s` for which rank r works `times[r]` seconds; None without one.

    >>> straggler([0.10, 0.10, 0.13, 0.10], step_s=0.2)
    2
    >>> straggler([0.10, 0.11, 0.11, 0.10], step_s=0.2)
    >>> straggler([0.001, 0.001, 0.002], step_s=0.2)
    """
    longest, median = max(times), statistics.median_low(times)
    holds_up = longest > FACTOR * median and longest - median > SHARE * step_s
    return times.index(longest) if holds_up else None
