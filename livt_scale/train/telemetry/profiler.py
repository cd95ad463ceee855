"""torch.profiler over chosen steps: `log.profile_steps: [20, 24]` -> STAGE/profile/steps-20-24-rank-0.json.gz.

The file opens in https://ui.perfetto.dev or chrome://tracing. It tells what no sum of seconds tells: which kernels, on
which stream, hidden behind which. The steps that are traced are slower. Neither a profiler that cannot start nor a file
that cannot be written ends the run.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MAX_BYTES = 2**30  # of a trace before it is packed; a step of ViT-L is some 10 MB


class Profiler:
    """Traces the steps `steps` (first and last, counted from 1) of this rank; None: nothing."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: tuple[int, int] | None,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._rank, self._say = folder, rank, say
        self._first, self._last = steps or (0, -1)
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._running: profile | None = None
        self._begun_at = 0
        self._failed = False

    def before(self, step: int) -> None:
        """Step `step` begins. A run that is continued within the steps traces the rest of them."""
        if self._running is not None or self._failed or not self._first <= step <= self._last:
            return
        try:
            running = profile(activities=self._activities)
            running.start()
        except RuntimeError as error:
            self._failed = True
            self._say(f"no profile: the profiler does not start: {error}")
            return
        self._running, self._begun_at = running, step

    def after(self, step: int) -> None:
        """Step `step` has ended."""
        if self._running is not None and step >= self._last:
            self.end(step)

    def end(self, step: int) -> None:
        """Write what has been traced, up to `step`; nothing where nothing is."""
        if self._running is None:
            return
        running, self._running = self._running, None
        name = f"steps-{self._begun_at}-{step}-rank-{self._rank}.json"
        plain = self._folder / f".tmp-{name}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.stop()
            running.export_chrome_trace(str(plain))
            size = plain.stat().st_size
            if size > MAX_BYTES:
                raise OSError(f"it has {size / 2**20:.0f} MiB, the limit is {MAX_BYTES / 2**20:.0f}: trace fewer steps")
            _pack(plain, self._folder / f"{name}.gz")
            self._say(f"profile of steps {self._begun_at} to {step}: {self._folder / name}.gz")
        except (OSError, RuntimeError) as error:
            self._say(f"no profile of steps {self._begun_at} to {step}: {error}")
        finally:
            with suppress(OSError):  # the folder is no folder, or not ours
                plain.unlink(missing_ok=True)


def _pack(plain: Path, packed: Path) -> None:
    temporary = packed.with_name(f".tmp-{packed.name}")
    try:
        with plain.open("rb") as source, gzip.open(temporary, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        temporary.rename(packed)
    finally:
        temporary.unlink(missing_ok=True)
