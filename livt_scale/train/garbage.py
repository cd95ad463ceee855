"""Python's garbage collection at the same steps on all ranks.

By itself each rank collects when its own counters say so: some tens of milliseconds, in which all others wait for it at
the next collective, and at hundreds of ranks there is nearly always one (pytorch/torchtitan#148). So it is off during a
stage, and done every COLLECT_EVERY steps for young objects, and for all where a checkpoint is saved anyway. What is
there when the stage begins, modules above all, is left out then (`gc.freeze`): a save would wait for it.
"""

from __future__ import annotations

import gc

from livt_scale.train.loop import Hook, Loop, Step

COLLECT_EVERY = 50  # steps; torchtitan's number
YOUNG = 1  # the generation up to which is collected then


class GarbageCollection(Hook):
    """Switches the automatic collection off, and on again at the end of the stage if it was on.

    A program that has frozen objects itself is left to it.
    """

    def at_start(self, loop: Loop) -> None:
        self._was_enabled, self._freezes = gc.isenabled(), gc.get_freeze_count() == 0
        gc.disable()
        gc.collect()
        if self._freezes:
            gc.freeze()

    def after_step(self, loop: Loop, step: Step) -> None:
        if step.number % COLLECT_EVERY == 0:
            gc.collect(YOUNG)

    def on_save(self, loop: Loop, step: Step) -> None:
        gc.collect()

    def close(self, loop: Loop) -> None:
        if self._freezes:
            gc.unfreeze()
        if self._was_enabled:
            gc.enable()
