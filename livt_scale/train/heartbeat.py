"""The progress of each rank, in one file per rank: shows stragglers, and names a rank that is gone.

RUN/STAGE/heartbeats/rank-3.json
    {"rank": 3, "host": "gpu07", "pid": 4711, "state": "running", "phase": "step", "step": 1234,
     "since": 1764000000.1, "at": 1764000003.0, "why": ""}

`since`: when the rank came into this phase of this step; `at`: when the file was written, by a thread that runs
while the rank computes. state: running -> done | stopped (by a request) | failed (its own error: `why`) |
peer_lost (the error of another). Nothing here is ever an error of the run: on a full disk the files grow old.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from livt_scale.util.outside import read_json

State = Literal["running", "done", "stopped", "failed", "peer_lost"]
FOLDER = "heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """The last heartbeat of one rank. Times are those of its host, in seconds since 1970."""

    rank: int
    host: str
    pid: int
    state: State
    phase: str
    step: int
    since: float
    at: float
    why: str = ""

    @property
    def where(self) -> str:
        """`step 12 (data), 34 s ago, process 4711 on gpu07`"""
        return f"step {self.step} ({self.phase}), {max(time.time() - self.at, 0):.0f} s ago, {self.process}"

    @property
    def process(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to be gone: only of a process on this host it can be known."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        with suppress(OSError, IndexError):  # one that ended and was not yet fetched by its launcher
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return False


def write(folder: Path, beat: Heartbeat) -> None:
    """Write the file of `beat`'s rank. Errors are ignored: the file grows old instead."""
    path = folder / FOLDER / f"rank-{beat.rank}.json"
    temporary = path.with_suffix(".writing")
    with suppress(OSError):  # not synced: of no use after a power cut
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(beat)) + "\n", encoding="utf-8")
        temporary.replace(path)


def clear(folder: Path) -> None:
    """Remove those of an earlier start, before any rank of this one writes."""
    with suppress(OSError):
        for path in (folder / FOLDER).glob("rank-*.json"):
            path.unlink()


def read(folder: Path, *, world_size: int) -> list[Heartbeat]:
    """The last heartbeat of each rank below `world_size` that has one which can be read, in rank order."""
    return read_ranks(folder, range(world_size))


def read_ranks(folder: Path, ranks: Iterable[int]) -> list[Heartbeat]:
    """The last heartbeat of each of `ranks` that has one which can be read, in their order."""
    beats = []
    for rank in ranks:
        with suppress(OSError, ValueError, TypeError):
            beats.append(Heartbeat(**read_json(folder / FOLDER / f"rank-{rank}.json", "status")))
    return beats


def slowest(beats: Iterable[Heartbeat]) -> Heartbeat | None:
    """Who is behind: the lowest step; of those, the one that has been in its phase for longest."""
    running = [beat for beat in beats if beat.state == "running"]
    return min(running, key=lambda beat: (beat.step, beat.since, beat.rank), default=None)


def summary(beats: list[Heartbeat]) -> dict[str, Any]:
    """For status.json: the number of ranks, their lowest and highest step, which one is behind and since when."""
    if not beats:
        return {"count": 0}
    behind = slowest(beats)
    found: dict[str, Any] = {
        "count": len(beats),
        "min_step": min(beat.step for beat in beats),
        "max_step": max(beat.step for beat in beats),
        "oldest_s": round(max(beat.at for beat in beats) - min(beat.at for beat in beats), 1),
    }
    if behind is not None:
        waits_s = round(behind.at - behind.since, 1)
        found["slowest"] = {"rank": behind.rank, "host": behind.host, "phase": behind.phase, "for_s": waits_s}
    return found
