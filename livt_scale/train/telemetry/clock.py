"""Where a step's seconds go: named parts, summed between two lines of metrics.jsonl.

    with clock.part("forward"):          # what the device does
        loss = model(images)
    with clock.host("data_wait"):        # what this process waits for
        batch = next(batches)

On a GPU a part is the time between two events in its stream, read when the GPU has passed them: no step waits for the
clock, and an asynchronous launch is not mistaken for the work. On CPUs both kinds are wall time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEVICE_PARTS = ("forward", "backward", "agree", "optimizer")
HOST_PARTS = ("data_wait", "checkpoint_stall", "evaluation")
PARTS = (*DEVICE_PARTS, *HOST_PARTS)


class StepClock:
    """Seconds of each part since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as the device's part `name`."""
        if not self._cuda:
            with self.host(name):
                yield
            return
        begun = self._mark()
        yield
        self._pending.append((name, begun, self._mark()))
        self._read_passed()

    @contextmanager
    def host(self, name: str) -> Iterator[None]:
        """Time the block as this process sees it."""
        begun = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - begun

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call. On a GPU it waits for running work: once per line and per save."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._read_passed()
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return taken

    def _mark(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read_passed(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, begun, ended = self._pending.popleft()
            self._seconds[name] += begun.elapsed_time(ended) / 1000
            self._spare += (begun, ended)
