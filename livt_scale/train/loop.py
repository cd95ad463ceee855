"""The training loop of both stages and of every strategy: `Loop`, made of steps, and the `Hook`s called around them.

    loop = Loop(task, state, schedule=schedule, plan=plan, world=world, hooks=[Evaluate(…), Save(…), …])
    loop.run(batches_from)          # from state.step to the end of the stage

A step accumulates the gradients of the rank's micro-batches, agrees with the other ranks on the mean loss and on
whether to stop, updates the weights unless loss or gradient forbid it, and advances the position. Everything else a run
does (logs, evaluation, checkpoints, …) is a hook. The learning rate, the samples, their augmentation and masks are
functions of the step, so a resumed run does not drift.

On a GPU the host does not wait for an ordinary step. The device itself leaves out an update whose loss or gradient is
not finite, and the host reads loss, norm and requests to stop of a step after it has enqueued the next one. A stop and
a policy of `faults` therefore act one step later, on all ranks at the same step. Steps that log, evaluate or save are
read before their hooks are called. `Loop.reads_late` says where this holds; a CPU reads every step immediately.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from livt_scale import optim
from livt_scale.config.recipe import Ema, StagePart
from livt_scale.data.loader import Batch
from livt_scale.distributed.strategy import Groups, StepResult, Strategy
from livt_scale.distributed.world import World
from livt_scale.train.anomalies import Anomaly
from livt_scale.train.batch_plan import BatchPlan
from livt_scale.train.readout import Readout, StepOutcome
from livt_scale.train.schedule import Schedule
from livt_scale.train.telemetry.clock import StepClock
from livt_scale.train.train_state import TrainState

UNKNOWN = StepOutcome(math.nan, asks_to_stop=False, result=StepResult(math.nan, applied=False))
Point = Literal["before_step", "after_backward", "before_update", "on_anomaly", "after_step", "on_save"]


@dataclass(frozen=True)
class Evaluation:
    """What a stage's `evaluate` returns: values to log, the score of the weights, and the full report."""

    values: dict[str, float]
    score: float
    report: dict[str, Any]


class Evaluator(Protocol):
    """Evaluates the weights that a strategy holds; a collective call. final: they are those of the finished stage."""

    def __call__(self, strategy: Strategy, *, final: bool) -> Evaluation: ...


@dataclass
class StageTask:
    """The loop's interface to a stage.

    `objective(call, batch)` gives the mean loss of a micro-batch, calling the model through `call`. `evaluate`,
    `draw` and `begin` are called on all ranks.
    """

    part: StagePart
    model: nn.Module
    groups: Groups
    objective: Callable[[Callable[..., Any], Batch], Tensor]
    evaluate: Evaluator | None = None
    evaluate_every_epochs: int | None = None
    scored_on: str | None = None  # digest of the set that `evaluate` evaluates on
    origin: dict[str, Any] | None = None  # lineage of the initial weights; None: from the seed
    teacher: str | None = None  # digest of the weights of the model that teaches this one
    draw: Callable[[Strategy, Path], None] | None = None  # a picture for each checkpoint, into this file
    average: Ema | None = None  # of the weights, kept beside them
    begin: Callable[[Strategy], None] | None = None  # sets initial weights; not called where the stage is resumed
    close: Callable[[], None] | None = None  # called at the end of the stage


@dataclass
class Step:
    """One step: what is known of it so far. The loop fills it in from top to bottom."""

    number: int  # counted from 1: how many steps the stage has behind it after this one
    lr: float
    began_s: float  # time.perf_counter
    rank_loss: Tensor  # [], mean over this rank's micro-batches
    keys: list[str] = field(default_factory=list)  # of this rank's samples
    wants_stop: bool = False  # this rank asks to stop
    # From here on the same on every rank
    outcome: StepOutcome = UNKNOWN
    pending: Readout | None = None  # the outcome, while it is on the device
    stop: bool = False  # the run stops after this step
    anomaly: Anomaly | None = None
    save: bool = False  # save a checkpoint after this step; hooks may set it
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)  # further fields for a line of metrics.jsonl
    evaluation: Evaluation | None = None

    @property
    def loss(self) -> float:
        """Mean over the ranks. Waits for the device if it has not arrived."""
        return self.arrived().loss

    @property
    def result(self) -> StepResult:
        """Of the optimizer's step. Waits for the device if it has not arrived."""
        return self.arrived().result

    def arrived(self) -> StepOutcome:
        if self.pending is not None:
            self.outcome, self.pending = self.pending.read(), None
        return self.outcome


class Hook:
    """Something that a run does at named points of the loop. A hook overrides the points that it needs.

    Hooks are called on every rank in the order of the loop's list, so they may call collectives. An exception ends the
    run. `loop` is the run, `step` what is known of the current step.
    """

    def at_start(self, loop: Loop) -> None:
        """Before the first step after a start or resumption."""

    def before_step(self, loop: Loop, step: Step) -> None:
        """Before the first micro-batch is taken."""

    def after_backward(self, loop: Loop, step: Step) -> None:
        """The gradients and `rank_loss` are complete; set `wants_stop` here."""

    def before_update(self, loop: Loop, step: Step) -> None:
        """The optimizer is about to change the weights; not called where the loss is known to forbid it."""

    def on_anomaly(self, loop: Loop, step: Step) -> None:
        """The weights were not updated because of `step.anomaly`."""

    def after_step(self, loop: Loop, step: Step) -> None:
        """The step is complete and `loop.state.step` counts it. Set `save` here to have a checkpoint saved."""

    def on_save(self, loop: Loop, step: Step) -> None:
        """After `after_step` of all hooks, if one of them has set `save`. `Save` saves; later hooks see it done."""

    def at_end(self, loop: Loop) -> None:
        """After the last step of the stage."""

    def close(self, loop: Loop) -> None:
        """However the loop ends, in the reverse order of `at_start`."""


@dataclass
class Loop:
    """Trains `state` by `task`. `clock` measures the parts of a step.

    reads_late: a step's outcome is read after the next one is enqueued; None: on a GPU, if the strategy can decide
    there and no policy needs the loss before the update.
    """

    task: StageTask
    state: TrainState
    schedule: Schedule
    plan: BatchPlan
    world: World
    hooks: Sequence[Hook]
    reads_late: bool | None = None
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = StepClock(self.world.device)
        strategy, device = self.state.strategy, self.world.device
        if self.reads_late is None:
            on_gpu = device.type == "cuda"
            self.reads_late = on_gpu and strategy.on_device is not None and not self.state.anomalies.needs_each_loss
        self._unread: Step | None = None  # the newest step, where it is read late
        self._flags = torch.eye(2, dtype=torch.double, device=device)[1]  # False and True, on the device already

    def run(self, batches_from: Callable[[int], Iterator[Batch]]) -> None:
        """Train from `state.step` to the end of the stage. Raises Preempted, NonFiniteError, …

        `batches_from(step)` gives the rank's micro-batches from that step to the end of the stage.
        """
        with ExitStack() as to_close:
            for hook in self.hooks:
                hook.at_start(self)
                to_close.callback(hook.close, self)

            batches = batches_from(self.state.step)
            while self.state.step < self.schedule.total:
                self._train_step(batches)

            for hook in self.hooks:
                hook.at_end(self)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        step = self._next_step()
        self._call("before_step", step)

        self._accumulate(step, batches)
        self._call("after_backward", step)

        if self.reads_late:
            self._update_on_device(step)
            self.state.step = step.number
            self._read_late(step)
        else:
            self._agree(step)
            self._update(step)
            self.state.step = step.number
        step.seconds = time.perf_counter() - step.began_s

        self._call("after_step", step)
        if step.save:
            self._read_now(step)
            self._call("on_save", step)

    def _call(self, point: Point, step: Step) -> None:
        for hook in self.hooks:
            getattr(hook, point)(self, step)

    def _next_step(self) -> Step:
        part = self.task.part
        lr = optim.lr_at(
            self.state.step,
            steps_per_epoch=self.schedule.steps_per_epoch,
            epochs=part.epochs,
            warmup_epochs=part.warmup_epochs,
            peak_lr=part.peak_lr,
            min_lr=part.min_lr,
        )
        rank_loss = torch.zeros((), device=self.world.device)
        return Step(self.state.step + 1, lr=lr, began_s=time.perf_counter(), rank_loss=rank_loss)

    def _accumulate(self, step: Step, batches: Iterator[Batch]) -> None:
        """Forward and backward of the rank's micro-batches."""
        strategy, count = self.state.strategy, self.plan.accumulation
        for micro_index in range(count):
            last = micro_index == count - 1
            with self.clock.host("data_wait"):
                batch = next(batches)
            batch = batch.to(self.world.device)

            with self.clock.part("forward"):
                loss = self.task.objective(lambda *inputs, last=last: strategy.call(*inputs, last=last), batch) / count
            with self.clock.part("backward"):
                strategy.backward(loss, last=last)

            step.rank_loss += loss.detach()
            step.keys += batch.keys

    def _sums(self, step: Step) -> Tensor:
        """One small all-reduce: [2] float64, the sum of the ranks' losses and how many ranks ask to stop."""
        sums = torch.stack([step.rank_loss.double(), self._flags[int(step.wants_stop)]])
        if self.world.world_size > 1:
            dist.all_reduce(sums)
        return sums

    def _agree(self, step: Step) -> None:
        """The mean loss, and whether any rank asks to stop."""
        with self.clock.part("agree"):
            sum_loss, num_stops = self._sums(step).tolist()
        step.outcome = replace(UNKNOWN, loss=sum_loss / self.world.world_size, asks_to_stop=num_stops > 0)
        step.stop = step.save = step.outcome.asks_to_stop

    def _update(self, step: Step) -> None:
        """The optimizer's step, unless the mean loss forbids it: then the gradients are discarded."""
        anomalies, strategy = self.state.anomalies, self.state.strategy
        step.anomaly = anomalies.in_loss(step.loss, step=step.number)
        if step.anomaly is None:
            self._call("before_update", step)
            with self.clock.part("optimizer"):
                result = strategy.update(step.lr, max_norm=self.task.part.clip_grad)
            step.outcome = replace(step.outcome, result=result)
            self._judge_update(step)
        else:
            strategy.discard()
            self._call("on_anomaly", step)

    def _judge_update(self, step: Step) -> None:
        anomalies = self.state.anomalies
        if step.result.applied:
            anomalies.taken(step.loss)
        step.anomaly = anomalies.in_update(step.result)
        if step.anomaly is not None:
            self._call("on_anomaly", step)

    def _update_on_device(self, step: Step) -> None:
        """Enqueue agreement, the optimizer's step and the copy of what comes of them, without waiting for any."""
        with self.clock.part("agree"):
            sums = self._sums(step)
        self._call("before_update", step)
        on_device = self.state.strategy.on_device
        assert on_device is not None, "see reads_late"
        with self.clock.part("optimizer"):
            result = on_device.update_unless(~sums[0].isfinite(), step.lr, max_norm=self.task.part.clip_grad)
        step.pending = Readout(sums, result, world_size=self.world.world_size)

    def _read_late(self, step: Step) -> None:
        """Read the step before `step`, and `step` itself where something is due after it."""
        before, self._unread = self._unread, step
        if before is not None:
            self._judge(before)
            step.stop = before.outcome.asks_to_stop
            step.save = before.save or step.stop
            if before.anomaly is not None and before.anomaly.policy == "rollback":
                self._unread, step.pending = None, None  # rolled back with it
        done, schedule = step.number, self.schedule
        due = (schedule.logs, schedule.evaluates, schedule.saves, schedule.saves_locally)
        if step.save or any(is_due(done) for is_due in due):
            self._read_now(step)

    def _read_now(self, step: Step) -> None:
        if self._unread is step:
            self._unread = None
            self._judge(step)
            step.stop |= step.outcome.asks_to_stop
            step.save |= step.stop

    def _judge(self, step: Step) -> None:
        """What the host does about an update that the device has made or left out."""
        step.anomaly = self.state.anomalies.in_loss(step.loss, step=step.number)
        if step.anomaly is None:
            self._judge_update(step)
        else:
            self._call("on_anomaly", step)
