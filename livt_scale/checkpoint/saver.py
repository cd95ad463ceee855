"""Saves the values at the time of the call, atomically, while training continues.

`async`: `save` copies this rank's pieces and returns; a thread writes them, one save at a time, and communicates with
the other ranks over a separate process group. `sync`: `save` returns when the checkpoint is published.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor

from livt_scale.checkpoint.catalog import Retention, clean_leftovers
from livt_scale.checkpoint.commit import SaveJob, publish
from livt_scale.checkpoint.dcp import Pieces, Staging, WritePlan, plan_write, signature_of
from livt_scale.checkpoint.manifest import Position, plain_score
from livt_scale.distributed.collectives import Peers
from livt_scale.util.atomic import sync_folder
from livt_scale.util.errors import CheckpointError, PruneFailed, SaveFailed
from livt_scale.util.text import first_line

_log = logging.getLogger(__name__)
FIRST_PAUSE_S = 1.0  # before a failed save is tried again; then twice as long, and so on


class Saver:
    """Writes checkpoints into `folder`. Built on all ranks (a collective call), by the holder of the run's lock.

    A save that fails leaves the earlier checkpoints as they were. It is tried again `retries` times, from the copy in
    memory; then it is logged as a warning, or raised where `failures` says that it ends the run (async: from the next
    `save` or `wait`). peers: those who save together, where they are not all ranks; then `partial`: see `load`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Literal["sync", "async"] = "async",
        retention: Retention | None = None,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 1800,
        failures: Failures | None = None,
        retries: int = 0,
        peers: Peers | None = None,
        partial: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.mode = mode
        self.retention = retention or Retention()
        self.failures = failures or Failures()
        self.retries = retries
        self.saved_final = False
        self.partial = partial
        self.peers = peers or Peers.of_world(rank, world_size, timeout_s=timeout_s, all_raise=CheckpointError)
        self.longest_save_s: float | None = None  # from the call to the name; None: none has ended yet
        self.known_whole: dict[Path, object] = {}
        self._staging = Staging()
        self._plan: WritePlan | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if mode == "async" else None
        self._in_flight: _InFlight | None = None
        self.peers.on_rank0(self._prepare_folder)

    def save(
        self,
        state: dict[str, Tensor],
        *,
        position: Position,
        facts: dict[str, Any],
        score: float | None = None,
        final: bool = False,
    ) -> None:
        """Save `state` as the checkpoint of `position.step`; one that is there already is replaced.

        state: tensors by name, plain (the same on every rank) or DTensor; the same names on every rank.
        facts: plain JSON values; `score`: higher is better (for keep_best); `final`: never pruned.
        """
        assert state, "nothing to save"
        self.wait()
        called_s = time.monotonic()
        frozen_facts = json.loads(json.dumps(facts, allow_nan=False))
        if self._plan is None or self._plan.signature != signature_of(state):
            self._plan = plan_write(state, self.peers, partial=self.partial)
        stage = self._staging.copy if self._thread else Pieces.live
        job = SaveJob(
            folder=self.folder,
            plan=self._plan,
            pieces=stage(state, self._plan, self.peers),
            manifest={
                "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "position": {"epoch": position.epoch, "step": position.step},
                "world_size": self.peers.world_size,
                "score": plain_score(score),
                "final": final,
                "facts": frozen_facts,
            },
            retention=self.retention,
            known_whole=self.known_whole,
        )

        def write() -> None:
            _Write(job, self.peers, self.retries)()
            self.longest_save_s = max(time.monotonic() - called_s, self.longest_save_s or 0.0)

        if self._thread is None:
            self._settle(write, position.step, final=final)
        else:
            self._in_flight = _InFlight(self._thread.submit(write), position.step, final)

    def wait(self) -> None:
        """Return when nothing is being written; CheckpointError if the save in flight failed and that ends the run."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            self._settle(in_flight.future.result, in_flight.step, final=in_flight.final)

    def _settle(self, result: Callable[[], None], step: int, *, final: bool) -> None:
        """All ranks alike: a failure on one of them has become that of all."""
        try:
            result()
        except (SaveFailed, PruneFailed) as error:
            old = self.failures.max_age_s is not None and self.peers.on_rank0(self.failures.is_old)
            ends = self.failures.failed(error, step=step, final=final, old=old)
            if ends is error:
                raise
            if ends is not None:
                raise ends from error
            if self.peers.leads:
                _log.warning("%s; training continues", error)
        else:
            self.failures.saved(step)
            self.saved_final = final

    def close(self) -> None:
        """Wait, then give thread and process group back. The Saver cannot be used again."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self.peers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with also_raising(error):
            self.close()

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)
            clean_leftovers(self.folder)
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints in {self.folder}: {error.strerror}") from error


@contextmanager
def also_raising(error: BaseException | None) -> Iterator[None]:
    """Raise what fails in this block, unless `error` is being raised: then add the failure to it as a note.

    Any failure: a rank that is gone breaks a step and the save in flight alike, and `error` names the rank.
    """
    try:
        yield
    except Exception as failed:
        if error is None:
            raise
        known = isinstance(failed, CheckpointError)
        what = "was not saved" if known else f"may not be saved ({type(failed).__name__})"
        error.add_note(f"Besides, the last checkpoint {what}: {failed if known else first_line(failed)}")


@dataclass(frozen=True)
class _InFlight:
    future: Future[None]
    step: int
    final: bool


@dataclass(frozen=True)
class _Write:
    """Publishes `job`; a failed one again after a pause, `retries` times."""

    job: SaveJob
    peers: Peers
    retries: int

    def __call__(self) -> None:
        for attempt in range(self.retries):
            try:
                return publish(self.job, self.peers)
            except SaveFailed as error:  # the same on all ranks, so all of them try again
                if self.peers.leads:
                    _log.warning("%s; retrying", error)
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        return publish(self.job, self.peers)


@dataclass
class Failures:
    """Counts failed saves, alike on all ranks. limit: consecutive failures that end the run; None: no limit."""

    limit: int | None = 1
    max_age_s: float | None = None
    clock: Callable[[], float] = time.monotonic
    in_a_row: int = 0
    total: int = 0
    last: str = ""
    durable_step: int | None = None  # of the newest that was saved since the start
    _durable_at_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._durable_at_s = self.clock()

    def saved(self, step: int) -> None:
        self.in_a_row = 0
        self.durable_step = step
        self._durable_at_s = self.clock()

    def is_old(self) -> bool:
        """Whether the newest durable state is older than the limit. Rank 0 decides, because clocks differ."""
        return self.max_age_s is not None and self.clock() - self._durable_at_s > self.max_age_s

    def failed(self, error: SaveFailed | PruneFailed, *, step: int, final: bool, old: bool) -> CheckpointError | None:
        """Note a failure; the error that ends the run, if this one does."""
        self.total += 1
        self.last = str(error)
        if isinstance(error, PruneFailed):  # it is there; a disk that fills up by it fails the next save
            self.saved(step)
            return error if self.limit == 1 else None
        self.in_a_row += 1
        if final or self.limit == 1:
            return error
        if self.limit is not None and self.in_a_row >= self.limit:
            why = f"the last {self.in_a_row} saves have failed (checkpoint.max_failed_saves)"
            return SaveFailed(f"{error.message}; {why}", remedy=error.remedy)
        if old:
            assert self.max_age_s is not None
            age_min = (self.clock() - self._durable_at_s) / 60
            why = f"nothing was saved for {age_min:.0f} min (checkpoint.max_unsaved_min: {self.max_age_s / 60:g})"
            return SaveFailed(f"{error.message}; {why}", remedy=error.remedy)
        return None

    def report(self) -> dict[str, Any]:
        """For status.json: nothing as long as nothing failed."""
        if not self.total:
            return {}
        return {"failed_saves": self.total, "failed_saves_in_a_row": self.in_a_row, "last_failed_save": self.last}
