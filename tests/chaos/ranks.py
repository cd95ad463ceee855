"""A run of several ranks without a launcher: each a process of its own, whose exit code and words are its own.

What ends the run when a rank dies or hangs is then the run itself, and not torchrun, which would end the others.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from tests import warm
from tests.whole_runs import REPO, Livt, final_weights, free_port, metrics

FAST = {"faults__heartbeat_s": 0.5, "data__workers": 0}


class Ranks:
    """`world` processes of `livt train --stage pretrain`; each says what it says into a file."""

    def __init__(self, livt: Livt, run_dir: Path, *faults: str, world: int = 2, env: Any = None, **sets: Any) -> None:
        self.livt, self.world = livt, world
        self.started_s = time.monotonic()
        words = [*faults, "--", *livt.train_words(run_dir, **{**FAST, **sets}), "--stage", "pretrain"]
        port = str(free_port())
        self.said_in = [livt.folder / f"rank {rank} of {run_dir.name}.txt" for rank in range(world)]
        self.processes = []
        for rank in range(world):
            with self.said_in[rank].open("w") as file:
                process = warm.Popen(
                    ["-m", "tests.chaos.sabotage", *words],
                    cwd=livt.folder,
                    env={**os.environ, **_environment(rank, world, port), **(env or {})},
                    stdout=warm.DEVNULL,
                    stderr=file,
                )
            self.processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    def said(self, rank: int) -> str:
        return self.said_in[rank].read_text()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        self.processes[rank].send_signal(number)

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def wait_for(self, condition: Callable[[], object], *, limit_s: float = 240) -> None:
        """Until `condition`, as long as all ranks run."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            assert self.running, "\n".join(self.said(rank) for rank in range(self.world))
            time.sleep(0.002)

    def ended(self, *ranks: int, within_s: float) -> tuple[list[int], float]:
        """Exit codes of `ranks` (of all), and how long it took until the last of them had ended; bounded."""
        began = time.monotonic()
        codes = []
        for rank in ranks or range(self.world):
            left_s = began + within_s - time.monotonic()
            try:
                codes.append(self.processes[rank].wait(max(left_s, 0.01)))
            except warm.TimeoutExpired:
                raise AssertionError(f"rank {rank} did not end within {within_s} s:\n{self.said(rank)}") from None
        return codes, time.monotonic() - began


def _environment(rank: int, world: int, port: str) -> dict[str, str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    known = {name: str(value) for name, value in place.items()}
    rest = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "PYTHONPATH": str(REPO)}
    return known | rest | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def assert_same_pretraining(one: Path, other: Path) -> None:
    """Bit for bit: weights, moments, and what metrics.jsonl says of each step."""
    ours, theirs = final_weights(one, "pretrain"), final_weights(other, "pretrain")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    timeless = ("step", "epoch", "loss", "lr", "grad_norm")
    assert [[m[k] for k in timeless] for m in metrics(one, "pretrain")] == [
        [m[k] for k in timeless] for m in metrics(other, "pretrain")
    ]
