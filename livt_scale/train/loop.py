"""The one loop, for both stages and every strategy. A stage comes as a `Task`, its features at named points.

A step: take the rank's micro-batches, add up gradients, agree (mean loss, is somebody asked to stop), update, unless
loss or gradient forbid it. The learning rate, the samples, their augmentation and masks are functions of the step:
nothing drifts when a run is continued.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from livt_scale import optim
from livt_scale.checkpoint.load import Position
from livt_scale.checkpoint.manager import Tiers
from livt_scale.config.recipe import Checkpoint, Ema, Faults, StagePart
from livt_scale.data.loader import Batch
from livt_scale.distributed.strategy import Groups, StepResult, Strategy
from livt_scale.distributed.world import World
from livt_scale.train.anomalies import Anomaly, step_over
from livt_scale.train.batch_plan import BatchPlan
from livt_scale.train.preempt import Preemption
from livt_scale.train.replica_check import check_alike
from livt_scale.train.run_dir import Status
from livt_scale.train.telemetry.clock import StepClock
from livt_scale.train.telemetry.metrics_log import Telemetry
from livt_scale.train.train_state import TrainState
from livt_scale.train.watchdog import Watchdog


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gives the loop: values to note, the score of the weights, and the report in full."""

    values: dict[str, float]
    score: float
    report: dict[str, Any]


@dataclass
class Task:
    """What a stage is to the loop.

    `objective(call, batch)` gives the mean loss of a micro-batch, calling the model through `call`. `evaluate` and
    `draw` are called on all ranks; `evaluate` last of all with the weights that the stage ends with: `fit` returns it.
    """

    part: StagePart
    model: nn.Module
    groups: Groups
    objective: Callable[[Callable[..., Any], Batch], Tensor]
    evaluate: Callable[[Strategy], Evaluation] | None = None
    evaluate_every_epochs: int | None = None
    origin: dict[str, Any] | None = None  # lineage of the weights that the stage begins with; None: the seed
    draw: Callable[[Strategy, Path], None] | None = None  # a picture beside each checkpoint, into this file
    average: Ema | None = None  # of the weights, kept beside them


@dataclass
class Schedule:
    """Steps of a stage, and after which of them something is due."""

    epochs: int
    steps_per_epoch: int
    saving: Checkpoint
    evaluate_every_epochs: int | None = None
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.epochs * self.steps_per_epoch

    def position(self, done: int) -> Position:
        return Position(epoch=done // self.steps_per_epoch, step=done)

    def evaluates(self, done: int) -> bool:
        every = self.evaluate_every_epochs
        return done == self.total or (every is not None and done % (every * self.steps_per_epoch) == 0)

    def saves(self, done: int) -> bool:
        due = done % (self.saving.every_steps or self.steps_per_epoch) == 0
        kept = self.saving.keep_every_epochs
        return done == self.total or due or (kept is not None and done % (kept * self.steps_per_epoch) == 0)

    def saves_locally(self, done: int) -> bool:
        every = self.saving.local_every_steps
        return every is not None and done % every == 0


@dataclass(frozen=True)
class Guard:
    """What looks after a run: who asks it to stop, who sees that it goes on, what it does about faults."""

    preemption: Preemption
    watchdog: Watchdog
    faults: Faults


def fit(
    task: Task,
    batches: Iterator[Batch],
    *,
    state: TrainState,
    schedule: Schedule,
    plan: BatchPlan,
    saver: Tiers,
    telemetry: Telemetry,
    status: Status,
    guard: Guard,
    world: World,
    folder: Path,
) -> Evaluation | None:
    """Train from `state.step` to the end of the stage, saving on the way. Raises Preempted, NonFiniteError, …

    Returns the evaluation of the final weights; None where the stage has none, or nothing was left to train.
    """
    evaluation: Evaluation | None = None
    guard.preemption.begins()
    guard.watchdog.at("first step", state.step)
    batches = guard.watchdog.waits_seen(batches)
    while state.step < schedule.total:
        started = time.perf_counter()
        telemetry.begin(state.step + 1)
        lr = _learning_rate(task.part, schedule, state.step)
        loss, keys = _accumulate(
            task, batches, strategy=state.strategy, count=plan.accumulation, world=world, clock=telemetry.clock
        )
        with telemetry.clock.part("agree"):
            agreed = _agree(loss, guard.preemption.wanted(save_s=saver.longest_save_s), world=world)
        update, anomaly = _update(task, state, lr, agreed.loss, telemetry)
        if anomaly is not None:
            samples = (not bool(torch.isfinite(loss)), keys)
            step_over(
                anomaly, state.anomalies, step=state.step + 1, samples=samples, world=world, folder=folder,
                roll_back=lambda: state.roll_back(saver), say=telemetry.say,
            )  # fmt: skip
        state.step += 1
        telemetry.step(
            state.step,
            loss=agreed.loss,
            grad_norm=update.grad_norm,
            lr=lr,
            step_s=time.perf_counter() - started,
            applied=update.applied,
            exchange_s=update.exchange_s,
        )
        save = agreed.stop or (anomaly is not None and anomaly.policy == "rollback")
        evaluation = _after_step(task, state, schedule, saver, telemetry, status, guard, world, folder, save=save)
        if agreed.stop and state.step < schedule.total:
            why = guard.preemption.requested or "a request to another rank"
            raise state.stopped(saver, why=why, total=schedule.total)
        guard.watchdog.at("step", state.step)
    guard.watchdog.at("checkpoint")
    saver.wait()
    return evaluation


def _learning_rate(part: StagePart, schedule: Schedule, step: int) -> float:
    return optim.lr_at(
        step,
        steps_per_epoch=schedule.steps_per_epoch,
        epochs=part.epochs,
        warmup_epochs=part.warmup_epochs,
        peak_lr=part.peak_lr,
        min_lr=part.min_lr,
    )


def _accumulate(
    task: Task, batches: Iterator[Batch], strategy: Strategy, *, count: int, world: World, clock: StepClock
) -> tuple[Tensor, list[str]]:
    """Forward and backward of a rank's micro-batches: their mean loss and their keys."""
    total = torch.zeros((), device=world.device)
    keys: list[str] = []
    for index in range(count):
        last = index == count - 1
        with clock.host("data_wait"):
            batch = next(batches)
        batch = batch.to(total.device)
        with clock.part("forward"):
            loss = task.objective(lambda *inputs, last=last: strategy.call(*inputs, last=last), batch) / count
        with clock.part("backward"):
            strategy.backward(loss, last=last)
        total += loss.detach()
        keys += batch.keys
    return total, keys


def _update(
    task: Task, state: TrainState, lr: float, loss: float, telemetry: Telemetry
) -> tuple[StepResult, Anomaly | None]:
    """The optimizer's step, unless the mean loss over the ranks forbids it: then the gradients are forgotten."""
    anomalies, strategy = state.anomalies, state.strategy
    anomaly = anomalies.in_loss(loss, step=state.step + 1, say=telemetry.say)
    if anomaly is not None:
        strategy.discard()
        return StepResult(math.nan, applied=False), anomaly
    telemetry.before_update(state.step + 1, loss_scale=(strategy.scaler() or {}).get("scale", 1.0))
    with telemetry.clock.part("optimizer"):
        update = strategy.update(lr, max_norm=task.part.clip_grad)
    if update.applied:
        anomalies.taken(loss)
    return update, anomalies.in_update(update)


@dataclass(frozen=True)
class _Agreed:
    loss: float
    stop: bool


def _agree(loss: Tensor, stop: bool, *, world: World) -> _Agreed:
    """The same word on every rank, by one small all-reduce a step: mean loss, and whether anybody must stop."""
    values = torch.stack([loss.double(), loss.new_tensor(float(stop), dtype=torch.double)])
    if world.world_size > 1:
        dist.all_reduce(values)
    sum_loss, stops = values.tolist()
    return _Agreed(sum_loss / world.world_size, stops > 0)


def _after_step(
    task: Task,
    state: TrainState,
    schedule: Schedule,
    saver: Tiers,
    telemetry: Telemetry,
    status: Status,
    guard: Guard,
    world: World,
    folder: Path,
    *,
    save: bool,
) -> Evaluation | None:
    """What is due after a step: comparison of the ranks, evaluation (returned), checkpoint and picture, the status.

    `save`: a checkpoint is asked for, due or not.
    """
    done, evaluation = state.step, None
    if guard.faults.digest_every_steps and done % guard.faults.digest_every_steps == 0:
        check_alike(state.strategy.state(), step=done, world=world)
    if task.evaluate is not None and schedule.evaluates(done):
        guard.watchdog.at("evaluation", done)
        with telemetry.clock.host("evaluation"):
            evaluation = task.evaluate(state.strategy)
        telemetry.note(done, **evaluation.values)
    if schedule.saves(done):
        state.anomalies.checkpoint_due(done)
    if schedule.saves(done) or save or evaluation is not None:
        guard.watchdog.at("checkpoint", done)
        score = evaluation.score if evaluation is not None else None
        sums = telemetry.sums
        with telemetry.clock.host("checkpoint_stall"):
            state.save(saver, schedule.position(done), score=score, final=done == schedule.total, sums=sums)
        longest_s = saver.longest_save_s  # what `livt submit` plans with
        took: dict[str, Any] = {} if longest_s is None else {"longest_save_s": round(longest_s, 3)}
        status.write("running", step=done, total_steps=schedule.total, **took, **saver.report())
        if task.draw is not None:
            task.draw(state.strategy, folder / "samples" / f"step-{done:08d}.png")
    elif schedule.saves_locally(done):
        guard.watchdog.at("checkpoint", done)
        with telemetry.clock.host("checkpoint_stall"):
            state.save_locally(saver, schedule.position(done), sums=telemetry.sums)
    return evaluation
