"""torch.profiler over chosen steps: `log.profile_steps: [20, 24]` -> STAGE/profile/steps-20-24-rank-0.json.gz.

The file opens in https://ui.perfetto.dev or chrome://tracing. It shows what no sum of seconds shows: which kernels ran,
on which stream, overlapping with which. The traced steps are slower. A profiler that cannot start and a file that
cannot be written are logged and do not end the run.
"""

from __future__ import annotations

import gzip
import logging
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from livt_scale.distributed.world import World
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.util.log import EVERY_RANK

MAX_BYTES = 2**30  # of a trace before it is packed; a step of ViT-L is some 10 MB
_log = logging.getLogger(__name__)


class Profiler(Hook):
    """Traces the steps `steps` (first and last, counted from 1) of this rank. After a resumption, the rest of them."""

    def __init__(self, folder: Path, *, steps: tuple[int, int]) -> None:
        self._folder = folder
        self._first, self._last = steps
        self._running: profile | None = None
        self._begun_at = 0
        self._failed = False

    def before_step(self, loop: Loop, step: Step) -> None:
        if self._running is not None or self._failed or not self._first <= step.number <= self._last:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        try:
            # There is one cycle, which torch 2.11 would warn is the only one kept.
            running = profile(activities=activities, acc_events=True)
            running.start()
        except RuntimeError as error:
            self._failed = True
            _log.warning("no profile: the profiler does not start: %s", error)
            return
        self._running, self._begun_at = running, step.number

    def after_step(self, loop: Loop, step: Step) -> None:
        if step.number >= self._last:
            self._write(step.number, loop.world)

    def close(self, loop: Loop) -> None:
        self._write(loop.state.step, loop.world)

    def _write(self, step: int, world: World) -> None:
        """Write the trace up to `step`, if one is running."""
        if self._running is None:
            return
        running, self._running = self._running, None
        name = f"steps-{self._begun_at}-{step}-rank-{world.rank}.json"
        plain = self._folder / f".tmp-{name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.stop()
            running.export_chrome_trace(str(plain))
            size = plain.stat().st_size
            if size > MAX_BYTES:
                raise OSError(f"it has {size / 2**20:.0f} MiB, the limit is {MAX_BYTES / 2**20:.0f}: trace fewer steps")
            _pack(plain, self._folder / f"{name}.gz")
            path = self._folder / f"{name}.gz"
            _log.info("profile of steps %d to %d: %s", self._begun_at, step, path, extra=EVERY_RANK)
        except (OSError, RuntimeError) as error:
            _log.warning("no profile of steps %d to %d: %s", self._begun_at, step, error)
        finally:
            with suppress(OSError):  # the folder is a file, or not ours
                plain.unlink(missing_ok=True)


def _pack(plain: Path, packed: Path) -> None:
    temporary = packed.with_name(f".tmp-{packed.name}")
    try:
        with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        temporary.rename(packed)
    finally:
        temporary.unlink(missing_ok=True)
