"""Stand-ins for what hooks are given: a loop that trains nothing, and its steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from livt_scale.config.recipe import Checkpoint
from livt_scale.distributed.strategy import StepResult
from livt_scale.distributed.world import World
from livt_scale.train.anomalies import Anomalies
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.readout import StepOutcome
from livt_scale.train.schedule import Schedule
from livt_scale.train.train_state import TrainState


def idle_loop(
    *hooks: Hook,
    total: int = 20,
    epoch: int = 10,
    log_every: int = 1,
    batch: int = 64,
    world: World = World(),  # noqa: B008 - frozen
    start: int = 0,
    **state: Any,
) -> Loop:
    """A loop of `total` steps, `epoch` in an epoch, after `start` of them; it has no model."""
    schedule = Schedule(total // epoch, epoch, Checkpoint(), log_every_steps=log_every)
    task, plan = SimpleNamespace(part=SimpleNamespace(global_batch=batch)), SimpleNamespace()
    state = TrainState(SimpleNamespace(**state), {}, step=start, anomalies=Anomalies())
    return Loop(task, state, schedule=schedule, plan=plan, world=world, hooks=hooks)


def a_step(number: int, *, loss: float = 1.0, grad_norm: float = 1.0, applied: bool = True, **more: Any) -> Step:
    known = {"lr": 0.5, "began_s": time.perf_counter(), "rank_loss": torch.tensor(loss), "seconds": 0.25}
    outcome = StepOutcome(loss, asks_to_stop=False, result=StepResult(grad_norm, applied=applied))
    return Step(number, **{**known, **more}, outcome=outcome)


@contextmanager
def started(loop: Loop) -> Iterator[Loop]:
    """`loop` with its hooks started, and closed at the end of the block."""
    for hook in loop.hooks:
        hook.at_start(loop)
    yield loop
    for hook in loop.hooks:
        hook.close(loop)


def take(loop: Loop, step: Step) -> None:
    """Let the hooks see `step` as if the loop had taken it."""
    for point in ("before_step", "after_backward", "before_update"):
        for hook in loop.hooks:
            getattr(hook, point)(loop, step)
    loop.state.step = step.number
    for hook in loop.hooks:
        hook.after_step(loop, step)
