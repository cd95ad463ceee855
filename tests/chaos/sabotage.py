"""`livt` with one fault built in: `python -m tests.chaos.sabotage FAULT … -- train RECIPE …`, as one rank of a run.

    hang:7:1     rank 1 sleeps for ever in its 7th step (counted from 1)
    lock:7:1     rank 1 does so while C code holds the interpreter's lock
    error:7:1    rank 1 meets an unreadable sample in its 7th step
    nan:7        the loss of the 7th step is nan, on rank 0
    spike:7      the loss of the 7th step is 1000 times itself, on all ranks
    flip:7:1     after its 7th step rank 1 has one bit of one weight changed
    SIGUSR2:7:1  in its 7th step rank 1 gets that signal (any signal's name)
    slow:0.05    every step takes so much longer, in seconds
    nccl         collectives wait for ever for a rank that is gone, and so does destroying a group; short bounds

The faults are a hook of the loop; `livt train` is replaced by a command that trains with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from livt_scale.cli import main
from livt_scale.config.load import load_recipe
from livt_scale.distributed import world
from livt_scale.distributed.ddp import Ddp
from livt_scale.train import lost_peers, watchdog
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.run import train
from livt_scale.util.errors import SampleError

LOSS_FACTORS = {"nan": torch.nan, "spike": 1000.0}


class Sabotage(Hook):
    def __init__(self, faults: list[str]) -> None:
        rank = int(os.environ.get("RANK", "0"))
        self.slow_s = 0.0
        self.plan: dict[int, list[str]] = {}
        for fault in faults:
            kind, at, *ranks = [*fault.split(":"), ""]
            if kind == "nccl":
                wait_like_nccl()
            elif kind == "slow":
                self.slow_s = float(at)
            elif rank == int((ranks[0] if ranks else "") or (0 if kind == "nan" else rank)):
                self.plan.setdefault(int(at), []).append(kind)

    def before_step(self, loop: Loop, step: Step) -> None:
        time.sleep(self.slow_s)
        faults = self.plan.get(step.number, [])
        for name in faults:
            if name.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[name])
        if "hang" in faults:
            time.sleep(1e6)
        if "lock" in faults:
            ctypes.PyDLL(None).sleep(10**6)
        if "error" in faults:
            raise SampleError("shard x.tar, offset 512, key a-key: not an image", remedy="livt shards verify")

    def after_backward(self, loop: Loop, step: Step) -> None:
        for fault in self.plan.get(step.number, []):
            step.rank_loss *= LOSS_FACTORS.get(fault, 1.0)

    def after_step(self, loop: Loop, step: Step) -> None:
        if "flip" in self.plan.get(step.number, []):
            next(loop.state.strategy.model.parameters()).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)


def wait_like_nccl() -> None:
    """Where gloo raises an error because a rank is gone, wait for ever."""

    def patient(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **named: Any) -> Any:
            try:
                return call(*args, **named)
            except RuntimeError:
                time.sleep(1e6)

        return wrapped

    for name in ("all_reduce", "all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"):
        setattr(dist, name, patient(getattr(dist, name)))
    Ddp.backward = patient(Ddp.backward)
    dist.destroy_process_group = lambda *_: time.sleep(1e6)
    lost_peers.IDLE_S = watchdog.IDLE_S = world.LEAVE_S = 1.0
    watchdog.ENDING_S = 3.0


if __name__ == "__main__":
    split = sys.argv.index("--")
    hooks = [Sabotage(sys.argv[1:split])]
    sys.argv[1:] = sys.argv[split + 1 :]

    @main.app.command("train")
    def sabotaged(
        recipe: Path,
        stage: Annotated[str | None, typer.Option()] = None,
        sets: Annotated[list[str] | None, typer.Option("--set")] = None,
        report: Annotated[bool, typer.Option()] = False,
    ) -> None:
        assert not report, "the report is not sabotaged"
        train(load_recipe(recipe, sets=sets or []), stage=stage, hooks=hooks)

    main.command.cache_clear()  # the server of the tests' forks has built the command line already
    main.main()
