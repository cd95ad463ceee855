"""What the training loop costs beside the steps themselves.

    python benchmarks/overhead.py --json overhead.json   # the quickstart's model and batch: minutes (GPU: ViT-B)
    python benchmarks/overhead.py --checkpoints             # with an asynchronous checkpoint every 50 steps
    python benchmarks/overhead.py --quick                   # a few steps: does it run?

Ours is `livt_scale.train.loop.Loop` with the hooks of `livt train`: schedule, gradient norm, agreement on loss and
signals, metrics.jsonl, TensorBoard, status.json, heartbeat, watchdog, the clock before a time limit, detection of loss
spikes, garbage collection. The bare loop is forward, backward, step, zero_grad on a second model with the same weights.
Both get the same batches of real images, loaded before. The steps alternate, one of the loop, one bare, so that a busy
machine slows both; times are summed over the 20 steps of a log interval, so that the line written once per interval
counts, and the overhead is the median over intervals of loop / bare - 1. `cpu_s`: CPU seconds of a step, of all threads
of the process; the difference, `loop_cpu_s`, is the CPU time of the loop around a step, which other programs change
little. With --checkpoints the loop also pays for the writing: the bare step waits until a save has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from livt_scale import optim
from livt_scale.checkpoint.manager import Tiers
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Parallel, Recipe, Stage
from livt_scale.data.loader import Batch, train_batches
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.train.batch_plan import plan_batches
from livt_scale.train.finetune import finetune_task
from livt_scale.train.garbage import GarbageCollection
from livt_scale.train.hooks import Save, StopOnRequest
from livt_scale.train.loop import Loop, StageTask
from livt_scale.train.preempt import Preemption
from livt_scale.train.pretrain import pretrain_task
from livt_scale.train.run_dir import Status
from livt_scale.train.schedule import Schedule
from livt_scale.train.telemetry.metrics_log import MetricsLog
from livt_scale.train.telemetry.mfu import speed_of
from livt_scale.train.telemetry.trackers import open_trackers
from livt_scale.train.train_state import TrainState, run_facts
from livt_scale.train.watchdog import Watchdog

RECIPE = Path(__file__).parents[1] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
NUM_BATCHES = 8  # held in memory, used in turn
NEVER = 10**9
WARM_UP_INTERVALS = 1  # not counted


class TakenInTurn(Iterator[Batch]):
    """The loop's batches. Between two steps of the loop, on its asking for the next batch, one bare step is taken."""

    def __init__(self, batches: list[Batch], *, bare_step: Callable[[Batch], None], settle: Callable[[], None]) -> None:
        self._batches, self._bare_step, self._settle = cycle(batches), bare_step, settle
        self._handed: tuple[float, float] | None = None
        self.loop_s: list[float] = []
        self.bare_s: list[float] = []
        self.loop_cpu_s: list[float] = []
        self.bare_cpu_s: list[float] = []

    def __next__(self) -> Batch:
        self._settle()  # what the loop has begun, it ends on its own time
        if self._handed is not None:
            _add_passed(self._handed, self.loop_s, self.loop_cpu_s)
        batch = next(self._batches)
        started = _clocks()
        self._bare_step(batch)
        _wait_for_gpu()
        _add_passed(started, self.bare_s, self.bare_cpu_s)
        self._handed = _clocks()
        return batch


def _clocks() -> tuple[float, float]:
    """Wall time and CPU time of this process."""
    return time.perf_counter(), time.process_time()


def _add_passed(since: tuple[float, float], wall_s: list[float], cpu_s: list[float]) -> None:
    now = _clocks()
    wall_s.append(now[0] - since[0])
    cpu_s.append(now[1] - since[1])


def quickstart(stage: Stage, *, batch: int, log_every: int) -> Recipe:
    sets = [f"stages.{stage}.global_batch={batch}", f"stages.{stage}.micro_batch={batch}", "data.workers=0"]
    sets += [f"log.every_steps={log_every}", "log.tensorboard=true", "stages.finetune.init=scratch"]
    if torch.cuda.is_available():
        sets += ["model.size=vit_b"]  # the quickstart's is so small that a GPU would wait for its launches
    return load_recipe(RECIPE, sets=sets)


def make_task(recipe: Recipe, stage: Stage, shards: ShardSet, folder: Path) -> StageTask:
    if stage == "pretrain":
        return pretrain_task(recipe, shards, world=World())
    return replace(finetune_task(recipe, shards, run_dir=folder, world=World()), evaluate=None)


def make_bare_step(task: StageTask) -> Callable[[Batch], None]:
    """Forward, backward, step, zero_grad of `task`'s model, and nothing else."""
    device = World().device
    model = task.model.to(device)
    optimizer = optim.make_adamw(task.groups(model), betas=task.part.betas)
    optim.set_lr(optimizer, 1e-4)

    def call(*inputs: Any, last: bool = True) -> Any:  # noqa: ARG001 - as the loop's
        return model(*inputs)

    def step(batch: Batch) -> None:
        task.objective(call, batch.to(device)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(recipe: Recipe, stage: Stage, *, intervals: int, save_every: int | None = None) -> dict[str, Any]:
    """Seconds a step of the loop and of the bare one, and the overhead, over `intervals` log intervals."""
    shards = ShardSet.open(recipe.data.train)
    part = recipe.stage(stage)
    window = recipe.log.every_steps
    with tempfile.TemporaryDirectory(prefix="livt-overhead-") as name:
        folder = Path(name)
        task, twin = (make_task(recipe, stage, shards, folder) for _ in range(2))
        loader = train_batches(
            shards, recipe, stage=stage, rank=0, world_size=1, micro_batch=part.micro_batch, epoch=0, step=0
        )
        with loader:
            batches = list(islice(loader, NUM_BATCHES))
        steps = (WARM_UP_INTERVALS + intervals) * window
        timed = run_loop(task, recipe, stage, shards, folder, steps=steps, save_every=save_every or NEVER, twin=twin,
                         batches=batches)  # fmt: skip
    counted = slice(WARM_UP_INTERVALS * window, steps)
    loop, bare, loop_cpu, bare_cpu = (
        _sums(seconds[counted], window) for seconds in (timed.loop_s, timed.bare_s, timed.loop_cpu_s, timed.bare_cpu_s)
    )
    around = [(a - b) / window for a, b in zip(loop_cpu, bare_cpu, strict=True)]
    ratios = [a / b for a, b in zip(loop, bare, strict=True)]
    return {
        "overhead": statistics.median(ratios) - 1,
        "overhead_middle_half": [q - 1 for q in _middle_half(ratios)],
        "step_s": {"loop": statistics.median(loop) / window, "bare": statistics.median(bare) / window},
        "cpu_s": {"loop": statistics.median(loop_cpu) / window, "bare": statistics.median(bare_cpu) / window},
        "loop_cpu_s": statistics.median(around),
        "loop_cpu_s_middle_half": _middle_half(around),
        "intervals": intervals,
        "steps_an_interval": window,
    }


def run_loop(
    task: StageTask,
    recipe: Recipe,
    stage: Stage,
    shards: ShardSet,
    folder: Path,
    *,
    steps: int,
    save_every: int,
    twin: StageTask,
    batches: list[Batch],
) -> TakenInTurn:
    """The loop as `livt train` runs it, over `steps` steps and one more that ends the time of the last."""
    world = World()
    saving = recipe.checkpoint.model_copy(update={"every_steps": save_every, "mode": "async"})
    schedule = Schedule(1, steps + 1, saving, log_every_steps=recipe.log.every_steps)
    strategy = make_strategy(Parallel(), task.model, task.groups, betas=task.part.betas, world=world)
    state = TrainState(strategy, run_facts(recipe, stage, shards, strategy=strategy.name, origin=task.origin))
    plan = plan_batches(task.part.global_batch, task.part.micro_batch, world_size=1, pairs=False)
    status = Status(folder, stage=stage, writes=True)
    speed = speed_of(recipe, stage, num_classes=shards.num_classes, device=world.device, world_size=1)
    trackers = open_trackers(recipe, stage, run_dir=folder, start_step=0, sent_to=0)
    log = MetricsLog(folder, speed=speed, trackers=trackers)
    watchdog = Watchdog(folder, status, world=world, faults=recipe.faults, timeout_s=recipe.parallel.timeout_s)
    with Tiers(folder / "checkpoints", saving=saving) as saver, Preemption(time.time() + 1e6) as preemption, watchdog:
        save = Save(saver, status=status, log=log, watchdog=watchdog)
        hooks = [watchdog, GarbageCollection(), log, save, StopOnRequest(preemption, saver)]

        def settle() -> None:
            saver.wait()
            _wait_for_gpu()

        turns = TakenInTurn(batches, bare_step=make_bare_step(twin), settle=settle)
        loop = Loop(task, state, schedule=schedule, plan=plan, world=world, hooks=hooks)
        loop.run(lambda _: watchdog.waits_seen(turns))
    return turns


def _sums(seconds: list[float], window: int) -> list[float]:
    return [sum(seconds[k : k + window]) for k in range(0, len(seconds), window)]


def _middle_half(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The training loop with everything on against bare steps.")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--stage", choices=("pretrain", "finetune"), default="pretrain")
    parser.add_argument("--checkpoints", action="store_true", help="save every 50 steps, and count the writing")
    parser.add_argument("--batch", type=int, help="images a step; default 64 (512 on a GPU), quick 8")
    parser.add_argument("--intervals", type=int, help="log intervals that are timed; default 20, quick 2")
    args = parser.parse_args(argv)
    batch = args.batch or (8 if args.quick else 512 if torch.cuda.is_available() else 64)
    intervals = args.intervals or (2 if args.quick else 20)
    if batch < 2 or batch % 2 or intervals < 1:
        parser.error("--batch must be even and at least 2, --intervals at least 1")
    recipe = quickstart(args.stage, batch=batch, log_every=5 if args.quick else 20)
    save_every = (5 if args.quick else 50) if args.checkpoints else None
    found = measure(recipe, args.stage, intervals=intervals, save_every=save_every)
    found |= {
        "stage": args.stage,
        "batch": batch,
        "model": recipe.model.size,
        "save_every_steps": save_every,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": os.getloadavg(),
        "quick": args.quick,
    }
    low, high = found["overhead_middle_half"]
    print(f"{args.stage}, {recipe.model.size}, batch {batch}, {found['threads']} threads, torch {torch.__version__}")
    for name, seconds in found["step_s"].items():
        print(f"{name:5} {1000 * seconds:8.2f} ms/step")
    print(f"overhead {found['overhead']:.2%} (middle half {low:.2%} to {high:.2%}) over {intervals} log intervals")
    low, high = (1000 * seconds for seconds in found["loop_cpu_s_middle_half"])
    print(f"CPU time of the loop around a step {1000 * found['loop_cpu_s']:.2f} ms ({low:.2f} to {high:.2f})")
    print(f"load {found['load'][0]:.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
