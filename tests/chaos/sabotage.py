"""`livt` with one fault built in: `python -m tests.chaos.sabotage FAULT … -- train RECIPE …`, as one rank of a run.

    hang:7:1     rank 1 sleeps for ever in its 7th step (counted from 1)
    lock:7:1     rank 1 does so while C code holds the interpreter's lock
    error:7:1    rank 1 meets an unreadable sample in its 7th step
    nan:7        the loss of the 7th step is nan, on rank 0
    spike:7      the loss of the 7th step is 1000 times itself, on all ranks
    flip:7:1     after its 7th step rank 1 has one bit of one weight changed
    SIGUSR2:7:1  in its 7th step rank 1 gets that signal (any signal's name)
    slow:0.05    every step takes so much longer, in seconds

It stands in the loop's own functions, at the step that the loop says it is in; a rank's number is the launcher's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import torch

from livt_scale.cli import main
from livt_scale.train import loop
from livt_scale.util.errors import SampleError


class Sabotage:
    def __init__(self, faults: list[str]) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.step = 0
        self.slow_s = 0.0
        self.plan: dict[int, list[str]] = {}
        for fault in faults:
            kind, at, *rank = fault.split(":")
            if kind == "slow":
                self.slow_s = float(at)
            elif self.rank == int((rank or [0 if kind == "nan" else self.rank])[0]):
                self.plan.setdefault(int(at), []).append(kind)

    def install(self) -> None:
        rate, accumulate, after = loop._learning_rate, loop._accumulate, loop._after_step

        def learning_rate(part, schedule, step):
            self.step = step + 1
            return rate(part, schedule, step)

        def accumulates(*args, **named):
            time.sleep(self.slow_s)
            faults = self.plan.get(self.step, [])
            for name in faults:
                if name.startswith("SIG"):
                    os.kill(os.getpid(), signal.Signals[name])
            if "hang" in faults:
                time.sleep(1e6)
            if "lock" in faults:
                ctypes.PyDLL(None).sleep(10**6)
            if "error" in faults:
                raise SampleError("shard x.tar, offset 512, key a-key: not an image", remedy="livt shards verify")
            loss, *rest = accumulate(*args, **named)
            for kind, factor in (("nan", torch.nan), ("spike", 1000.0)):
                loss = loss * factor if kind in faults else loss
            return loss, *rest

        def after_step(task, state, *args, **named):
            if "flip" in self.plan.get(self.step, []):
                next(state.strategy.model.parameters()).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
            return after(task, state, *args, **named)

        loop._learning_rate, loop._accumulate, loop._after_step = learning_rate, accumulates, after_step


if __name__ == "__main__":
    split = sys.argv.index("--")
    Sabotage(sys.argv[1:split]).install()
    sys.argv[1:] = sys.argv[split + 1 :]
    main.main()
