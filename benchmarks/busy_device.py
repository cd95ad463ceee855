"""How busy the training loop keeps a device that works by itself, as a GPU does.

    python benchmarks/busy_device.py --json busy.json       # 20 ms a step: half a minute
    python benchmarks/busy_device.py --device-ms 5

The device is imaginary: a step occupies it for --device-ms without using the CPU, and begins when the step before has
ended and the host has enqueued it. Around it runs `livt_scale.train.loop.Loop` with the hooks of `livt train` that
every step has. The loop is measured as it runs on a GPU (a step is read after the next one is enqueued) and as it runs
on a CPU (each step is read before the next one). Busy is the device's share of the time from first step to last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe
from livt_scale.data.loader import Batch
from livt_scale.distributed.strategy import DeviceResult, DeviceUpdates, StepResult
from livt_scale.distributed.world import World
from livt_scale.train import loop as training
from livt_scale.train.batch_plan import plan_batches
from livt_scale.train.hooks import StopOnRequest
from livt_scale.train.preempt import Preemption
from livt_scale.train.readout import Readout, StepOutcome
from livt_scale.train.run_dir import Status
from livt_scale.train.schedule import Schedule
from livt_scale.train.telemetry.metrics_log import MetricsLog
from livt_scale.train.train_state import TrainState
from livt_scale.train.watchdog import Watchdog

RECIPE = Path(__file__).parents[1] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


class Device:
    """A `Strategy` whose steps take `step_s` seconds of nobody's time."""

    name, lockstep = "ddp", False

    def __init__(self, step_s: float) -> None:
        self.step_s, self.free_at, self.busy_s, self.began_at = step_s, 0.0, 0.0, 0.0

    def call(self, *_: Any, last: bool) -> Tensor:  # noqa: ARG002 - as a strategy's
        return torch.ones(())

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Part of the step that `update` enqueues."""

    @property
    def on_device(self) -> DeviceUpdates:
        return self

    def update_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:  # noqa: ARG002
        now = time.perf_counter()
        self.began_at = self.began_at or now
        self.free_at = max(now, self.free_at) + self.step_s
        self.busy_s += self.step_s
        return DeviceResult(torch.ones(()), ~is_bad)

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        self.update_unless(torch.zeros((), dtype=torch.bool), lr, max_norm=max_norm)
        self.wait(self.free_at)
        return StepResult(1.0, applied=True)

    def wait(self, until: float) -> None:
        time.sleep(max(until - time.perf_counter(), 0))


def busy_share(recipe: Recipe, device: Device, *, steps: int, reads_late: bool) -> float:
    """The device's share of the time of `steps` steps."""

    class Awaited(Readout):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            self._ready_at = device.free_at

        def read(self) -> StepOutcome:
            device.wait(self._ready_at)
            return super().read()

    world, part = World(), recipe.stage("pretrain")
    keys = [f"train-000000/{k}" for k in range(part.micro_batch)]
    images = torch.zeros(len(keys), 1, 28, 28, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(len(keys), dtype=torch.int64), keys, epoch=0, step=0, micro_index=0)
    task = SimpleNamespace(part=part, objective=lambda call, batch: call(batch.images))
    schedule = Schedule(1, steps, recipe.checkpoint.model_copy(update={"every_steps": 10**9}), log_every_steps=50)
    state = TrainState(device, {})  # type: ignore[arg-type]
    plan = plan_batches(part.global_batch, part.micro_batch, world_size=1, pairs=False)
    with tempfile.TemporaryDirectory(prefix="livt-busy-") as name:
        folder = Path(name)
        log = MetricsLog(folder)
        status = Status(folder, stage="pretrain", writes=True)
        watchdog = Watchdog(folder, status, world=world, faults=recipe.faults, timeout_s=60)
        saver = SimpleNamespace(longest_save_s=None)
        with Preemption(time.time() + 1e6) as preemption, watchdog, mock.patch.object(training, "Readout", Awaited):
            hooks = [watchdog, log, StopOnRequest(preemption, saver)]  # type: ignore[arg-type]
            loop = training.Loop(task, state, schedule, plan, world, hooks, reads_late=reads_late)  # type: ignore[arg-type]
            loop.run(lambda _: repeat(batch))
    return device.busy_s / (device.free_at - device.began_at)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How busy the loop keeps a device that works by itself.")
    parser.add_argument("--device-ms", type=float, default=20.0, help="a step's time on the device; default 20")
    parser.add_argument("--steps", type=int, default=500, help="steps of each measurement; default 500")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(argv)
    recipe = load_recipe(RECIPE)
    found: dict[str, Any] = {"device_ms": args.device_ms, "steps": args.steps, "torch": torch.__version__}
    for name, reads_late in (("read one step later", True), ("read immediately", False)):
        share = busy_share(recipe, Device(args.device_ms / 1000), steps=args.steps, reads_late=reads_late)
        found[name] = share
        print(f"{name:20} the device is busy {share:.1%} of the time")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
