"""Nothing waits without a bound: a thread in each rank writes its heartbeat, and ends the process if it stalls.

    with Watchdog(folder, status, world=world, faults=recipe.faults, timeout_s=600) as watchdog:
        watchdog.at("evaluation", 1234)          # a phase begins; the next call is a sign of progress
        with watchdog.errors_told():             # an error is in the heartbeat before the connections close
            …

A phase that lasts longer than its bound (`faults.stall_timeout_s`, six times that for SLOW phases) ends the process
with exit code 1, after the stacks of all its threads were written to RUN/STAGE/stacks/rank-N.txt. The other ranks wait
for this one, so their watchdogs see no progress either, and each writes its own. Only time in which the process runs is
counted: a job may be suspended for hours. If C code holds the interpreter's lock and no Python thread runs,
faulthandler's own thread, which needs no lock, writes the stacks LOCKED_S later, and a second process kills this one.

An error of this rank is in its heartbeat before its connections close. So a rank that loses its connection to another
(gloo: "connection closed") reports which rank is gone and why, not what its socket saw. NCCL waits for a rank that is
gone: there the thread finds it (`lost_peers.py`), and ends this process within 30 s.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, NoReturn, Self, TypeVar

import torch.distributed as dist

from livt_scale.config.recipe import Faults
from livt_scale.distributed import flight_recorder
from livt_scale.distributed.world import World
from livt_scale.train import heartbeat
from livt_scale.train.guard import Guard
from livt_scale.train.heartbeat import Heartbeat
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.lost_peers import IDLE_S, MAX_SHOWN, REMEDY, LostPeers, lost_error
from livt_scale.train.run_dir import Status
from livt_scale.train.running_clock import RunningClock
from livt_scale.util.errors import EXIT_FAILED, LivtError, Preempted, RankLostError

Phase = Literal["start", "first step", "data", "step", "evaluation", "checkpoint", "ending"]
SLOW: tuple[Phase, ...] = ("start", "first step", "evaluation", "checkpoint")
SLOW_TIMES = 6
HANG_SHARE = 0.9  # of the collectives' time-out: before NCCL's own watchdog ends the process without a stack
ENDING_S = 60.0  # from an error to the process's end, closing files and connections
LOCKED_S = 15.0  # after the bound, for what no Python thread can end
DUMP_S = 2.0  # for faulthandler's own thread to write the stacks, before the process is killed
GAP_S = 5.0  # a thread that has not run for longer was stopped: a busy machine delays it by less
LINGER_S = 3.0  # a stalled rank waits before it ends, so that the others find a stall too, not a dead peer
STATUS_EVERY_S = 15.0
RECORD_S = 8.0  # for writing the last collectives
# In torch's RuntimeErrors when another rank is gone or silent (torch 2.11 to 2.14, gloo and NCCL)
PEER_WORDS = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")
Item = TypeVar("Item")


@dataclass(frozen=True)
class _Now:
    phase: Phase
    step: int
    since_s: float  # of RunningClock
    since: float  # of time.time, for others to read


class Watchdog(Hook):
    """The watchdog of one rank in one stage. `at` sets an attribute; the thread does the writing.

    It is entered before the loop, which it follows as its first hook.
    """

    def __init__(self, folder: Path, status: Status, *, world: World, faults: Faults, timeout_s: float) -> None:
        self._folder, self._status, self._world = folder, status, world
        self._stall_timeout_s = faults.stall_timeout_s or HANG_SHARE * timeout_s
        self._beat_s = faults.heartbeat_s
        self._clock = RunningClock(gap_s=min(GAP_S, self._stall_timeout_s / 4))
        self._now = _Now("start", 0, self._clock.now(), time.time())  # replaced, never changed: two threads read it
        self._state: heartbeat.State = "running"
        self._why = ""
        self._peers = LostPeers(folder, world=world, beat_s=faults.heartbeat_s)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: IO[str] | None = None

    def at(self, phase: Phase, step: int | None = None) -> None:
        """This rank has reached `phase`, with `step` steps complete (None: as many as before)."""
        self._now = _Now(phase, self._now.step if step is None else step, self._clock.now(), time.time())

    def at_start(self, loop: Loop) -> None:
        self._start = loop.state.step
        self.at("first step", self._start)

    def before_step(self, loop: Loop, step: Step) -> None:
        if loop.state.step > self._start:
            self.at("step", loop.state.step)

    @property
    def phase(self) -> Phase:
        return self._now.phase

    def waits_seen(self, items: Iterator[Item]) -> Iterator[Item]:
        """`items`; while waiting for the next one, this rank is in phase `data` (after its first step)."""
        while True:
            phase = self.phase
            if phase == "step":
                self.at("data")
            item = next(items)
            self.at(phase)
            yield item

    def __enter__(self) -> Self:
        with suppress(OSError):  # without a file, stderr has the stacks
            (self._folder / "stacks").mkdir(parents=True, exist_ok=True)
            self._stacks = self._stacks_path.open("w", encoding="utf-8")
        self._write()
        self._guard = Guard()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._guard.end()
        if self._state == "running":
            self._end("done" if error is None else _state_after(error), error)
        if self._stacks is not None:
            empty = self._stacks.tell() == 0
            self._stacks.close()
            if empty:
                with suppress(OSError):  # the folder goes with the last file
                    self._stacks_path.unlink()
                    self._stacks_path.parent.rmdir()

    @contextmanager
    def errors_told(self) -> Iterator[None]:
        """For a block with connections to other ranks: a broken connection becomes a RankLostError."""
        try:
            yield
        except BaseException as error:
            if self._state != "running":  # reported by an inner block already
                raise
            lost = self._world.world_size > 1 and _speaks_of_peers(error)
            self._end("peer_lost" if lost else _state_after(error), error)
            if not lost:
                raise
            self._keep(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
            raise self._who_is_lost(error) from error

    def bound_s(self, phase: Phase) -> float:
        """How long `phase` may last."""
        if phase == "ending":
            return ENDING_S
        return self._stall_timeout_s * (SLOW_TIMES if phase in SLOW else 1)

    @property
    def _stacks_path(self) -> Path:
        return self._folder / "stacks" / f"rank-{self._world.rank}.txt"

    def _end(self, state: heartbeat.State, error: BaseException | None) -> None:
        self._state, self._why = state, _said(error) if error is not None else ""
        self.at("ending")
        self._write()

    def _watch(self) -> None:
        tick_s = min(1.0, self._beat_s, self._stall_timeout_s / 10)
        written = reported = time.monotonic()
        while not self._ended.wait(tick_s):
            now, was_stopped, here = time.monotonic(), self._clock.tick(), self._now
            left_s = here.since_s + self.bound_s(here.phase) - self._clock.now()
            if left_s <= 0:
                self._hangs(here)
            if was_stopped:
                self._forget_stacks()
            faulthandler.dump_traceback_later(left_s + LOCKED_S, file=self._stacks or sys.stderr)
            self._guard.allow(left_s + LOCKED_S + DUMP_S)
            if now - written >= self._beat_s:
                written = now
                self._write()
                self._look_at_peers()
            if self._world.is_main and now - reported >= max(STATUS_EVERY_S, self._beat_s):
                reported = now
                self._update_status()

    def _write(self) -> None:
        with self._lock:
            here = self._now
            beat = Heartbeat(
                rank=self._world.rank, host=socket.gethostname(), pid=os.getpid(), state=self._state,
                phase=here.phase, step=here.step, since=here.since, at=time.time(), why=self._why,
            )  # fmt: skip
            heartbeat.write(self._folder, beat)

    def _update_status(self) -> None:
        with suppress(OSError):
            beats = heartbeat.read(self._folder, world_size=self._world.world_size)
            self._status.add(step=self._now.step, ranks=heartbeat.summary(beats))

    def _look_at_peers(self) -> None:
        """End this process if it waits for a rank that is gone. Runs in the thread."""
        if self._clock.now() - self._now.since_s < IDLE_S or self._state != "running":
            self._peers.forget()
            return
        lost = self._peers.look()
        if not lost or self._state != "running":  # the main thread has found out while this one was looking
            return
        others = self._others()
        gone = [b for b in others if b.state == "failed"] or [b for b in others if b.state == "running" and b.is_dead]
        error = lost_error(gone or lost)
        self._state, self._why = "peer_lost", error.message
        self._write()
        record = self._keep_stacks(error.message)
        self._end_process(error, record, rank_0_is_lost=any(beat.rank == 0 for beat in gone or lost))

    def _hangs(self, here: _Now) -> None:
        """Name the ranks that are behind and end the process. Runs in the thread; does not return."""
        lasted_s = self._clock.now() - here.since_s
        what = f"rank {self._world.rank} came no further for {lasted_s:.0f} s"
        what += f" in phase {here.phase!r} after step {here.step}, at {_main_thread_is_at()}"
        first = [self._why] if self._state == "failed" else []  # its own error, in whose handling it hangs
        if not first:
            self._state, self._why = "failed", what
        self._write()
        record = self._keep_stacks(f"{what} (bound {self.bound_s(here.phase):.0f} s)")
        time.sleep(LINGER_S)
        others = self._others()
        silent = [beat for beat in others if beat.state == "running"]
        failed = [beat.why for beat in others if beat.state == "failed"]
        found = [*first, what, *failed, *(f"rank {beat.rank}: {beat.where}" for beat in silent)]
        remedy = f"see {self._folder / 'stacks'}; start the run again to resume from the last checkpoint"
        error = RankLostError("; ".join(found[:MAX_SHOWN]), remedy=remedy)
        self._end_process(error, record, rank_0_is_lost=any(beat.rank == 0 for beat in silent))

    def _keep_stacks(self, why: str) -> threading.Thread:
        """Write the stacks of all threads, and start to write the last collectives."""
        self._keep(f"{why}, {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n\n")
        with suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=self._stacks or sys.stderr, all_threads=True)
        return flight_recorder.start_dump(self._stacks_path.with_name(f"collectives-{self._world.rank}.json"))

    def _end_process(self, error: RankLostError, record: threading.Thread, *, rank_0_is_lost: bool) -> NoReturn:
        self._status_failed(str(error), rank_0_is_lost=rank_0_is_lost)
        with suppress(OSError, ValueError):
            print(f"livt: error on rank {self._world.rank}: {error}", file=sys.stderr, flush=True)
        record.join(RECORD_S)
        os._exit(EXIT_FAILED)

    def _status_failed(self, why: str, *, rank_0_is_lost: bool) -> None:
        """Rank 0 writes status.json; if it is gone, every other rank does."""
        if rank_0_is_lost:
            self._status.take_over()
        with suppress(OSError):
            self._status.write("failed", why=why)

    def _forget_stacks(self) -> None:
        """Faulthandler's timer expires while the process is stopped, and writes as soon as it is resumed."""
        with suppress(OSError, ValueError):
            faulthandler.cancel_dump_traceback_later()  # waits for it
            if self._stacks is not None:
                self._stacks.seek(0)
                self._stacks.truncate()

    def _keep(self, text: str) -> None:
        with suppress(OSError, ValueError):
            if self._stacks is not None:
                self._stacks.write(text)
                self._stacks.flush()

    def _who_is_lost(self, error: BaseException) -> RankLostError:
        """Which ranks are gone or have failed, by their heartbeats, once they have had time to write them."""
        first = {beat.rank: beat for beat in self._others()}
        deadline = time.monotonic() + 2 * self._beat_s + 1
        while True:
            others = self._others()
            lost = [b for b in others if b.state == "failed"] or [
                b for b in others if b.state == "running" and b.is_dead
            ]
            waiting = [b for b in others if b.state == "running"]
            if lost or not waiting or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        # A process on another host cannot be checked: one that no longer writes is taken for gone.
        lost = lost or [b for b in waiting if b == first.get(b.rank)]
        if any(b.rank == 0 for b in lost):
            self._status.take_over()
        if not lost:
            behind = heartbeat.slowest(waiting)
            why = f"rank {behind.rank} is behind all others: {behind.where}" if behind else "none of them reports why"
            what = f"rank {self._world.rank} lost the connection to the others after step {self._now.step}: {why}"
            return RankLostError(f"{what} ({_first_line(error)})", remedy=REMEDY)
        return lost_error(lost)

    def _others(self) -> list[Heartbeat]:
        beats = heartbeat.read(self._folder, world_size=self._world.world_size)
        return [beat for beat in beats if beat.rank != self._world.rank]


def _state_after(error: BaseException) -> heartbeat.State:
    return "stopped" if isinstance(error, Preempted) else "failed"


def _speaks_of_peers(error: BaseException | None) -> bool:
    """Whether an error, or a cause of it, is one that torch raises when another rank is gone or silent."""
    while error is not None:
        if isinstance(error, RankLostError):
            return False  # reported already
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_WORDS):
            return True
        error = error.__cause__
    return False


def _main_thread_is_at() -> str:
    """`loop.py:214 in _agree`: a hint at what the rank waits for; the file has the complete stack."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    code = frame.f_code if frame else None
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}" if frame and code else "an unknown line"


def _said(error: BaseException) -> str:
    return error.message if isinstance(error, LivtError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
