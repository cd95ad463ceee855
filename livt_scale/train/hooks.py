"""The hooks of every run that have no separate file: evaluation, checkpoints, pictures, the stop on request.

The others are in files named after their purpose: `watchdog.py`, `garbage.py`, `anomaly_policy.py`,
`replica_check.py` and, in telemetry/, `metrics_log.py`, `layer_stats.py`, `profiler.py`. `run.py` sets their order.
`Hook` in `loop.py` has the points at which a hook is called, and is the empty hook to derive from.

    class Announce(Hook):
        def after_step(self, loop, step):
            if step.number % 100 == 0:
                print(step.number, step.loss)

    train(recipe, hooks=[Announce()])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from livt_scale.checkpoint.manager import Tiers
from livt_scale.distributed.strategy import Strategy
from livt_scale.train.loop import Evaluation, Evaluator, Hook, Loop, Step
from livt_scale.train.preempt import Preemption
from livt_scale.train.run_dir import Status
from livt_scale.train.telemetry.metrics_log import MetricsLog
from livt_scale.train.watchdog import Watchdog
from livt_scale.util.log import DiskWarning


class Evaluate(Hook):
    """Evaluates after the steps of the schedule, and after the last one."""

    def __init__(self, evaluate: Evaluator, *, log: MetricsLog, watchdog: Watchdog) -> None:
        self._evaluate, self._log, self._watchdog = evaluate, log, watchdog
        self._of_final: Evaluation | None = None

    def after_step(self, loop: Loop, step: Step) -> None:
        if not loop.schedule.evaluates(step.number):
            return
        self._watchdog.at("evaluation", step.number)
        with loop.clock.host("evaluation"):
            final = step.number == loop.schedule.total
            step.evaluation = self._evaluate(loop.state.strategy, final=final)
        self._log.note(step.number, **step.evaluation.values)
        step.save = True
        if final:
            self._of_final = step.evaluation

    def of_final(self, loop: Loop) -> Evaluation:
        """The evaluation of the final weights. A run killed between its last checkpoint and here evaluates again."""
        self._watchdog.at("evaluation", loop.state.step)
        if self._of_final is None:
            self._of_final = self._evaluate(loop.state.strategy, final=True)
        return self._of_final


class Save(Hook):
    """Saves a checkpoint after the schedule's steps and when another hook requests one; records it in status.json.

    A checkpoint on the nodes' own disks is saved only where no shared one is.
    """

    def __init__(self, saver: Tiers, *, status: Status, log: MetricsLog, watchdog: Watchdog) -> None:
        self._saver, self._status, self._log, self._watchdog = saver, status, log, watchdog

    def after_step(self, loop: Loop, step: Step) -> None:
        done, schedule = step.number, loop.schedule
        if schedule.saves(done):
            loop.state.anomalies.checkpoint_due(done)
            step.save = True
        elif not step.save and schedule.saves_locally(done):
            self._watchdog.at("checkpoint", done)
            sums = self._log.sums
            with loop.clock.host("checkpoint_stall"):
                loop.state.save_locally(self._saver, schedule.position(done), sums=sums)

    def on_save(self, loop: Loop, step: Step) -> None:
        self._save(loop, score=step.evaluation.score if step.evaluation is not None else None)

    def at_end(self, loop: Loop) -> None:
        if not loop.state.is_final:  # it resumed where the stage now ends, which --allow has made shorter
            self._save(loop, score=loop.state.score)
        self._watchdog.at("checkpoint")
        self._saver.wait()

    def _save(self, loop: Loop, *, score: float | None) -> None:
        done, schedule = loop.state.step, loop.schedule
        self._watchdog.at("checkpoint", done)
        sums = self._log.sums
        with loop.clock.host("checkpoint_stall"):
            position, final = schedule.position(done), done == schedule.total
            loop.state.save(self._saver, position, score=score, final=final, sums=sums)

        longest_s = self._saver.longest_save_s  # `livt submit` plans with it
        took: dict[str, Any] = {} if longest_s is None else {"longest_save_s": round(longest_s, 3)}
        self._status.write("running", step=done, total_steps=schedule.total, **took, **self._saver.report())


class Pictures(Hook):
    """Draws a picture beside each checkpoint: RUN/STAGE/samples/step-00001234.png. A full disk costs only pictures."""

    def __init__(self, draw: Callable[[Strategy, Path], None], folder: Path, *, log: MetricsLog) -> None:
        self._draw, self._folder, self._log = draw, folder, log
        self._warn_of_disk = DiskWarning("pictures are missing")

    def on_save(self, loop: Loop, step: Step) -> None:
        path = self._folder / f"step-{step.number:08d}.png"
        try:
            self._draw(loop.state.strategy, path)
            self._log.picture("reconstructions", path, step=step.number)
        except OSError as error:
            self._warn_of_disk(path, error)


class StopOnRequest(Hook):
    """Stops the run once the step at which a rank was asked to stop is saved. The last hook: it raises Preempted."""

    def __init__(self, preemption: Preemption, saver: Tiers) -> None:
        self._preemption, self._saver = preemption, saver

    def at_start(self, loop: Loop) -> None:
        self._preemption.begins()

    def after_backward(self, loop: Loop, step: Step) -> None:
        step.wants_stop |= self._preemption.wanted(save_s=self._saver.longest_save_s)

    def on_save(self, loop: Loop, step: Step) -> None:
        total = loop.schedule.total
        if step.stop and step.number < total:
            why = self._preemption.requested or "a request to another rank"
            raise loop.state.stopped(self._saver, why=why, total=total)
