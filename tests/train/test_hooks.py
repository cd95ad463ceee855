"""What a hook from outside sees of a run, and what it can do."""

from __future__ import annotations

import shutil

import pytest
import torch

from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.train.loop import Hook
from livt_scale.train.run import run_dir_of, train
from livt_scale.util.errors import Preempted
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.whole_runs import final_weights, metrics

STEP = ["before_step", "after_backward", "before_update", "after_step"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 images: 2 steps an epoch."""
    return tiny_set(tmp_path_factory.mktemp("hooks") / "set")


@pytest.fixture
def recipe(shards, tmp_path):
    """4 steps; a checkpoint after the second and the last."""
    finetune = {"init": "scratch", "epochs": 2, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1}
    made = tiny_recipe(shards.folder, stages={"finetune": finetune}, model__depth=1, data__val=None)
    saving = made.checkpoint.model_copy(update={"mode": "sync"})
    log = made.log.model_copy(update={"every_steps": 1, "tensorboard": False})
    return made.model_copy(update={"run_dir": str(tmp_path / "run"), "checkpoint": saving, "log": log})


def saved_steps(recipe) -> list[int]:
    return [c.position.step for c in list_checkpoints(run_dir_of(recipe) / "finetune" / "checkpoints")]


class Recorder(Hook):
    """Notes each point that it is called at, with the number of the step or, outside of steps, of those before."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []


def noted(point):
    def call(self, loop, step=None):
        self.calls.append((point, loop.state.step if step is None else step.number))

    return call


for point in ("at_start", *STEP, "on_save", "on_anomaly", "at_end", "close"):
    setattr(Recorder, point, noted(point))


def test_points_come_in_order_and_saves_only_when_they_are_due(recipe):
    recorder = Recorder()
    train(recipe, hooks=[recorder])
    steps = [[(point, number) for point in STEP] for number in (1, 2, 3, 4)]
    saves = [[], [("on_save", 2)], [], [("on_save", 4)]]
    expected = [call for step, save in zip(steps, saves, strict=True) for call in [*step, *save]]
    assert recorder.calls == [("at_start", 0), *expected, ("at_end", 4), ("close", 4)]


class Asks(Hook):
    """Asks for a checkpoint after step 1, and to stop after step 3; notes what is saved when `on_save` is called."""

    def __init__(self, recipe) -> None:
        self.recipe = recipe
        self.saved: list[list[int]] = []

    def after_backward(self, loop, step):
        step.wants_stop = step.number == 3

    def after_step(self, loop, step):
        step.save |= step.number == 1

    def on_save(self, loop, step):
        self.saved.append(saved_steps(self.recipe))


def test_a_hook_asks_for_a_checkpoint_and_to_stop_and_the_run_resumes_bit_for_bit(recipe, tmp_path):
    asks = Asks(recipe)
    with pytest.raises(Preempted, match="after step 3 of 4; all of it is saved"):
        train(recipe, hooks=[asks])
    assert asks.saved == [[1], [1, 2], [2, 3]]  # it is there when the hook is called; keep_last is 2
    train(recipe)

    undisturbed = recipe.model_copy(update={"run_dir": str(tmp_path / "undisturbed")})
    train(undisturbed)
    ours, theirs = (final_weights(run_dir_of(of)) for of in (recipe, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = (metrics(run_dir_of(of), "finetune") for of in (recipe, undisturbed))
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]


def test_a_stage_shortened_to_its_newest_checkpoint_ends_with_that_as_its_final_one(recipe):
    def newest(run_dir):
        return list_checkpoints(run_dir / "finetune" / "checkpoints")[-1]

    asks = Asks(recipe)  # to stop after step 3 of 8; the checkpoint of step 2 is then the newest
    train_on = {"epochs": 4, "warmup_epochs": 0}
    with pytest.raises(Preempted):
        train(with_finetune(recipe, **train_on), hooks=[asks])
    shutil.rmtree(newest(run_dir_of(recipe)).path)
    train(with_finetune(recipe, **train_on | {"epochs": 1}), allow=["stages.finetune.epochs"])
    final = newest(run_dir_of(recipe))
    assert (final.position.step, final.final) == (2, True)
    train(with_finetune(recipe, **train_on | {"epochs": 1}), allow=["stages.finetune.epochs"])  # there is nothing to do


def with_finetune(recipe, **fields):
    part = recipe.stages.finetune.model_copy(update=fields)
    return recipe.model_copy(update={"stages": recipe.stages.model_copy(update={"finetune": part})})


class Breaks(Hook):
    def before_step(self, loop, step):
        if step.number == 2:
            raise ZeroDivisionError("planted")


def test_an_error_of_a_hook_ends_the_run_and_the_others_are_closed(recipe):
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError, match="planted"):
        train(recipe, hooks=[recorder, Breaks()])
    assert recorder.calls[-2:] == [("before_step", 2), ("close", 1)]
    assert ("at_end", 1) not in recorder.calls
