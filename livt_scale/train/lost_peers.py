"""Which other ranks are gone, by their heartbeats. For a rank that waits in a collective for one that never comes.

gloo raises an error when a socket breaks. NCCL waits on, so the watchdog's thread looks while its rank is idle:

    peers = LostPeers(folder, world=world, beat_s=5)
    peers.look()        [] or the heartbeats of ranks that are gone

A rank is gone if it has failed, if its process is gone (on this host), or if its heartbeat has not changed for SILENT_S
(on another). Rank 0 looks at all ranks, the others at rank 0 and at the next one, so that hundreds of ranks do not read
hundreds of files each: rank 0 finds any rank that is gone, and ends; then the others find rank 0.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

from livt_scale.distributed.world import World
from livt_scale.train import heartbeat
from livt_scale.train.heartbeat import Heartbeat
from livt_scale.util.errors import RankLostError

IDLE_S = 5.0  # without progress before a rank looks: where a socket breaks, its own error comes first
SILENT_S = 15.0  # at least, and three heartbeats
SLOW_START = 6  # times that at the start and in the first step, in which C code may hold the interpreter for longer
SKEW_S = 60.0  # between the clocks of two hosts
MAX_SHOWN = 4  # ranks in one message
REMEDY = "start the run again to resume from the last checkpoint; if it happens again, check that rank's log and node"


class LostPeers:
    """The other ranks as this one watches them. One thread uses it."""

    def __init__(self, folder: Path, *, world: World, beat_s: float) -> None:
        self._folder, self._world, self._beat_s = folder, world, beat_s
        self._began, self._looked_s = time.time(), 0.0
        self._silent: dict[int, tuple[Heartbeat, float]] = {}  # the last heartbeat, and for how long it has been that
        watched = range(world.world_size) if world.is_main else {0, (world.rank + 1) % world.world_size}
        self._watched = sorted(set(watched) - {world.rank})

    def forget(self) -> None:
        """This rank makes progress: what the others did before says nothing."""
        self._silent.clear()

    def look(self) -> list[Heartbeat]:
        """Those of the watched ranks that are gone. Call it at each heartbeat while this rank is idle."""
        now = time.monotonic()
        # A look that took long, as on a file system that hung, counts as two heartbeats: the others could not write.
        passed_s = min(now - self._looked_s, 2 * self._beat_s)
        self._looked_s = now
        for beat in heartbeat.read_ranks(self._folder, self._watched):
            before, silent_s = self._silent.get(beat.rank, (None, 0.0))
            self._silent[beat.rank] = (beat, silent_s + passed_s if beat == before else 0.0)
        return [beat for beat, silent_s in self._silent.values() if self._is_lost(beat, silent_s)]

    def _is_lost(self, beat: Heartbeat, silent_s: float) -> bool:
        if beat.at < self._began - SKEW_S:  # of an earlier start
            return False
        if beat.state != "running":
            return beat.state in ("failed", "peer_lost")
        if beat.host == socket.gethostname():
            return beat.is_dead
        bound_s = max(SILENT_S, 3 * self._beat_s)
        return silent_s > bound_s * (SLOW_START if beat.phase in ("start", "first step") else 1)


def lost_error(lost: Sequence[Heartbeat]) -> RankLostError:
    """The error of a rank whose peers `lost` are gone: which ones, and why as far as they have reported it."""
    named = "; ".join(_named(beat) for beat in lost[:MAX_SHOWN])
    more = f", and {len(lost) - MAX_SHOWN} more" if len(lost) > MAX_SHOWN else ""
    return RankLostError(f"{named}{more}", remedy=REMEDY)


def _named(beat: Heartbeat) -> str:
    if beat.state == "failed":
        return f"rank {beat.rank} stopped: {beat.why}"
    if beat.state == "peer_lost":
        return f"rank {beat.rank} ended: {beat.why}"
    return f"rank {beat.rank} is gone: last seen at {beat.where}"
