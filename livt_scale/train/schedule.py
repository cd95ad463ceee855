"""How many steps a stage has, and after which of them something is due. Steps are counted from the stage's beginning.

    3 epochs of 9 steps, checkpoint.every_steps 6, stages.finetune.eval_every_epochs 2, log.every_steps 4
    log lines      after  4, 8, 12, 16, 20, 24, 27
    evaluations    after 18, 27
    checkpoints    after 6, 12, 18, 24, 27

What is due is a function of the step, so a resumed run logs, evaluates and saves after the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from livt_scale.checkpoint.manifest import Position
from livt_scale.config.recipe import Checkpoint


@dataclass
class Schedule:
    """`evaluate_every_epochs` None: only after the last step."""

    epochs: int
    steps_per_epoch: int
    saving: Checkpoint
    evaluate_every_epochs: int | None = None
    log_every_steps: int = 1
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = self.epochs * self.steps_per_epoch

    def position(self, done: int) -> Position:
        return Position(epoch=done // self.steps_per_epoch, step=done)

    def logs(self, done: int) -> bool:
        return done % self.log_every_steps == 0 or done == self.total

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
