"""A loop that reads each step after the next one, as on a GPU, does what one does that reads it immediately."""

from __future__ import annotations

import json
import math

import pytest
import torch

from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.train.loop import Hook
from livt_scale.train.run import run_dir_of, train
from livt_scale.train.run_files import ANOMALIES
from livt_scale.util.errors import NonFiniteError, Preempted
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.whole_runs import final_weights, metrics

STEPS = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 images: 2 steps an epoch."""
    return tiny_set(tmp_path_factory.mktemp("late") / "set")


@pytest.fixture
def recipe(shards, tmp_path):
    """`recipe(name, **faults)`: 12 steps; log lines after every fourth step, checkpoints after every sixth."""

    def make(name: str, *, ema: bool = False, **faults):
        finetune = {"init": "scratch", "epochs": 6, "global_batch": 8, "micro_batch": 4, "warmup_epochs": 1}
        finetune |= {"clip_grad": 0.5} | ({"ema": {"decay": 0.9}} if ema else {})
        made = tiny_recipe(shards.folder, stages={"finetune": finetune}, model__depth=1, data__val=None)
        update = {
            "run_dir": str(tmp_path / name),
            "checkpoint": made.checkpoint.model_copy(update={"mode": "sync", "every_steps": 6, "keep_last": 9}),
            "log": made.log.model_copy(update={"every_steps": 4, "tensorboard": False}),
            "faults": made.faults.model_copy(update=faults),
        }
        return made.model_copy(update=update)

    return make


class Late(Hook):
    """Reads late, and does what it is told to at some steps: `bad`, a loss that is not a number; `stop`."""

    def __init__(self, *, late: bool = True, bad: tuple[int, ...] = (), stop: int | None = None) -> None:
        self._late, self._bad, self._stop = late, bad, stop
        self.unread: list[int] = []

    def at_start(self, loop):
        loop.reads_late = self._late

    def after_backward(self, loop, step):
        if step.number in self._bad:
            step.rank_loss *= math.nan
        step.wants_stop |= step.number == self._stop

    def after_step(self, loop, step):
        if step.pending is not None:
            self.unread.append(step.number)


def saved_steps(recipe) -> list[int]:
    return [c.position.step for c in list_checkpoints(run_dir_of(recipe) / "finetune" / "checkpoints")]


def facts(recipe):
    return list_checkpoints(run_dir_of(recipe) / "finetune" / "checkpoints")[-1].manifest.facts["anomalies"]


def assert_same(recipe, other):
    ours, theirs = (run_dir_of(r) for r in (recipe, other))
    weights, others = final_weights(ours), final_weights(theirs)
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    for line, another in zip(metrics(ours, "finetune"), metrics(theirs, "finetune"), strict=True):
        assert {k: line[k] for k in ("step", "loss", "lr", "grad_norm", "skipped_steps")} == {
            k: another[k] for k in ("step", "loss", "lr", "grad_norm", "skipped_steps")
        }
    assert facts(recipe) == facts(other)


@pytest.mark.parametrize("ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_weights_losses_and_facts_are_the_same_and_ordinary_steps_are_not_waited_for(recipe, ema):
    early, late = recipe("early", ema=ema), recipe("late", ema=ema)
    train(early)
    train(late, hooks=[hook := Late()])
    assert_same(late, early)
    assert hook.unread == [1, 2, 3, 5, 7, 9, 10, 11]  # all but those that log or save


@pytest.mark.parametrize(("bad", "ema"), [pytest.param((3,), False, marks=pytest.mark.slow), ((2, 3, 8), True)])
def test_a_bad_step_changes_nothing_and_its_own_samples_are_named(recipe, bad, ema):
    early, late = recipe("early", ema=ema, on_non_finite="skip"), recipe("late", ema=ema, on_non_finite="skip")
    train(early, hooks=[Late(late=False, bad=bad)])
    train(late, hooks=[Late(bad=bad)])
    assert_same(late, early)
    assert facts(late)["not_taken"][0][0] == bad[0]
    ours, theirs = (
        [json.loads(line) for line in (run_dir_of(r) / "finetune" / ANOMALIES).read_text().splitlines()]
        for r in (late, early)
    )
    same = ("step", "what", "policy", "not_taken", "samples")
    assert [[line[k] for k in same] for line in ours] == [[line[k] for k in same] for line in theirs]


@pytest.mark.parametrize("bad", [pytest.param(8, marks=pytest.mark.slow), 9])  # after 8 there is a log line
def test_a_rollback_takes_the_step_after_the_bad_one_with_it(recipe, bad):
    made = recipe("run", on_non_finite="rollback")
    train(made, hooks=[Late(bad=(bad,))])
    last = {8: 8, 9: 10}[bad]
    assert facts(made)["not_taken"] == [[7, last]]
    assert saved_steps(made) == [6, last, 12]
    assert all(t.isfinite().all() for t in final_weights(run_dir_of(made)).values())


def test_a_stop_by_policy_names_the_step_and_leaves_the_checkpoint_before_it(recipe):
    made = recipe("run", on_non_finite="stop")
    with pytest.raises(NonFiniteError, match=r"^step 9: the loss is nan\. Samples of the batch: "):
        train(made, hooks=[Late(bad=(9,))])
    assert saved_steps(made) == [6]


@pytest.mark.parametrize(("asked", "after"), [pytest.param(4, 4, marks=pytest.mark.slow), (9, 10)])
def test_a_request_stops_at_the_same_step_or_the_next_and_the_run_goes_on_exactly(recipe, asked, after):
    unbroken, made = recipe("unbroken"), recipe("run")
    train(unbroken)
    with pytest.raises(Preempted):
        train(made, hooks=[Late(stop=asked)])
    assert saved_steps(made)[-1] == after
    train(made, hooks=[Late()])
    assert_same(made, unbroken)


def test_a_hook_that_asks_for_a_loss_waits_for_it(recipe):
    class Losses(Hook):
        def __init__(self):
            self.seen = []

        def after_step(self, loop, step):
            self.seen.append((step.number, step.loss, step.result.grad_norm))

    train(recipe("early"), hooks=[early := Losses()])
    train(recipe("late"), hooks=[late := Losses(), Late()])
    assert late.seen == early.seen
    assert len(late.seen) == STEPS


def test_a_policy_that_needs_the_loss_first_reads_each_step(recipe):
    seen = []

    class Look(Hook):
        def at_start(self, loop):
            seen.append((loop.reads_late, loop.state.anomalies.needs_each_loss, loop.state.strategy.on_device))

    train(recipe("warns"), hooks=[Look()])
    train(recipe("skips", on_spike="skip"), hooks=[Look()])
    assert [(late, needs) for late, needs, _ in seen] == [(False, False), (False, True)]
    assert all(on_device is not None for *_, on_device in seen)
