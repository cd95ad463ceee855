"""Which steps are not taken, and that a run that is continued decides the same."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.config.recipe import Faults
from livt_scale.distributed.strategy import StepResult
from livt_scale.train.anomalies import MAX_OVERFLOWS, Anomalies, Anomaly
from livt_scale.train.anomaly_policy import AnomalyPolicy
from livt_scale.train.loop import Hook, Step
from livt_scale.train.run import train
from livt_scale.train.run_files import read_anomalies
from livt_scale.util.errors import NonFiniteError
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.train.loops import a_step, idle_loop


def judged(anomalies: Anomalies, losses: list[float]) -> list[bool]:
    """Whether each loss is one to skip; those that are not are taken."""
    found = []
    for step, loss in enumerate(losses, 1):
        anomaly = anomalies.in_loss(loss, step=step)
        found.append(anomaly is not None)
        if anomaly is None:
            anomalies.taken(loss)
        else:
            anomalies.skipped(step, step, rolled_back=False)
    return found


def spikes(window: int = 10, **more) -> Anomalies:
    return Anomalies(Faults(on_spike="skip", spike_window=window, **more))


def test_a_spike_is_far_above_the_losses_before_and_only_with_enough_of_them():
    usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98, 1.01, 0.99]
    assert judged(spikes(), [*usual, 1.2, 9.0, 1.0]) == [False] * 11 + [True, False]
    assert judged(spikes(), [*usual[:9], 9.0]) == [False] * 10  # nine before it
    assert judged(spikes(), [*usual, 0.001]) == [False] * 11  # a low loss is no harm
    assert judged(spikes(spike_deviations=1e3), [*usual, 9.0]) == [False] * 11


def test_losses_that_hardly_differ_do_not_make_a_small_step_a_spike():
    assert judged(spikes(), [1.0] * 10 + [1.05, 1.2]) == [False] * 11 + [True]  # 10 deviations of 1 %


def test_one_spike_does_not_hide_the_next():
    assert judged(spikes(), [1.0] * 10 + [50.0] * 5) == [False] * 10 + [True] * 5


@given(st.lists(st.floats(0.1, 50), min_size=12, max_size=40), st.integers(0, 40))
def test_a_continued_run_decides_as_the_unbroken_one(losses, cut):
    unbroken = judged(spikes(), losses)
    first, second = spikes(), spikes()
    begun = judged(first, losses[:cut])
    second.restore(json.loads(json.dumps(first.facts())))
    assert begun + judged(second, losses[cut:]) == unbroken


def test_a_warned_spike_is_logged_and_taken(caplog):
    caplog.set_level("INFO")
    anomalies = Anomalies(Faults(on_spike="warn", spike_window=10))
    for _ in range(10):
        anomalies.taken(1.0)
    assert anomalies.in_loss(8.0, step=11) is None
    assert caplog.messages == ["step 11: the loss is 8, 700 deviations above 1, the median before it"]
    assert Anomalies(Faults(on_spike="none")).in_loss(8.0, step=11) is None


def test_overflows_are_counted_and_only_many_in_a_row_are_an_anomaly():
    anomalies = Anomalies()
    overflow = StepResult(math.inf, applied=False, overflow=True)
    assert [anomalies.in_update(overflow) for _ in range(MAX_OVERFLOWS)] == [None] * MAX_OVERFLOWS
    assert anomalies.in_update(StepResult(1.0, applied=True)) is None
    assert [anomalies.in_update(overflow) for _ in range(MAX_OVERFLOWS)] == [None] * MAX_OVERFLOWS
    again = Anomalies()
    again.restore(json.loads(json.dumps(anomalies.facts())))
    for met in (anomalies, again):
        assert "loss scale in a row" in met.in_update(overflow).what
    assert "the loss is finite" in anomalies.in_update(StepResult(math.nan, applied=False)).what


def test_steps_that_were_not_taken_are_kept_as_ranges():
    anomalies = Anomalies()
    for first, last, back in ((7, 7, False), (8, 8, False), (20, 20, False), (19, 24, True)):
        anomalies.skipped(first, last, rolled_back=back)
    assert anomalies.not_taken == [(7, 8), (19, 24)]


def over(anomalies: Anomalies, policy: str, folder, *, step: int = 38, back_to: int | None = 30) -> Step:
    """A step that the policy has dealt with."""
    loop, taken = idle_loop(), a_step(step, keys=["a", "b"], anomaly=Anomaly("the loss is nan", policy))
    loop.state.anomalies = anomalies
    loop.state.roll_back = lambda saver: back_to
    AnomalyPolicy(saver=None, folder=folder).on_anomaly(loop, taken)
    return taken


def test_policies(tmp_path, caplog):
    anomalies = Anomalies()
    with pytest.raises(NonFiniteError, match=r"step 38: the loss is nan\. Samples of the batch: a, b"):
        over(anomalies, "stop", tmp_path)
    assert not over(anomalies, "skip", tmp_path).save
    assert over(anomalies, "rollback", tmp_path, step=40).save
    assert caplog.messages == [
        "step 38: the loss is nan: skip, weights as after step 37, no update for steps 38 to 38",
        "step 40: the loss is nan: rollback, weights as after step 30, no update for steps 31 to 40",
    ]
    assert anomalies.not_taken == [(31, 40)]
    assert anomalies.due_step == 40
    lines = [json.loads(line) for line in (tmp_path / "anomalies.jsonl").read_text().splitlines()]
    assert [(line["step"], line["policy"], line["not_taken"]) for line in lines] == [
        (38, "skip", [38, 38]),
        (40, "rollback", [31, 40]),
    ]
    assert lines[0]["samples"] == ["a", "b"]
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet to roll back to"):
        over(anomalies, "rollback", tmp_path, back_to=None)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_in_a_row_end_the_run(tmp_path, policy):
    anomalies = Anomalies(Faults(most_in_a_row=2))
    for step in (38, 39):
        over(anomalies, policy, tmp_path, step=step)
    with pytest.raises(NonFiniteError, match="it would be the 3th"):
        over(anomalies, policy, tmp_path, step=40)
    anomalies.taken(1.0)
    anomalies.checkpoint_due(45)
    over(anomalies, policy, tmp_path, step=46)


def test_checkpoints_due_without_a_step_taken_do_not_forget_rollbacks_also_where_the_run_is_resumed(tmp_path):
    anomalies = Anomalies(Faults(most_in_a_row=2))
    for step in (38, 39):
        over(anomalies, "rollback", tmp_path, step=step)
        anomalies.checkpoint_due(step)
        resumed = Anomalies(Faults(most_in_a_row=2))
        resumed.restore(json.loads(json.dumps(anomalies.facts())))
        anomalies = resumed
    with pytest.raises(NonFiniteError, match="it would be the 3th rollback"):
        over(anomalies, "rollback", tmp_path, step=40)


class NeverFiniteFrom(Hook):
    def __init__(self, step: int) -> None:
        self._step = step

    def after_backward(self, loop, step):
        if step.number >= self._step:
            step.rank_loss *= math.nan


def test_a_loss_that_is_never_finite_again_ends_a_run_of_short_epochs_that_rolls_back(tmp_path):
    shards = tiny_set(tmp_path / "set")
    part = {"init": "scratch", "epochs": 6, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1}
    recipe = tiny_recipe(
        shards.folder, stages={"finetune": part}, model__depth=1, data__val=None, log={"tensorboard": False},
        faults={"on_non_finite": "rollback"},
    ).model_copy(update={"run_dir": str(tmp_path / "run")})  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step 9: the loss is nan; it would be the 6th rollback"):  # of 12
        train(recipe, hooks=[NeverFiniteFrom(4)])


def test_a_step_that_a_resumed_run_takes_again_is_recorded_once(tmp_path):
    class NotFiniteAt(Hook):
        def after_backward(self, loop, step):
            if step.number in (2, 5):
                step.rank_loss *= math.nan

    class KilledAfter5(Hook):
        def after_step(self, loop, step):
            if step.number == 5:
                raise KeyboardInterrupt

    shards = tiny_set(tmp_path / "set")  # 2 steps an epoch
    part = {"init": "scratch", "epochs": 4, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1}
    recipe = tiny_recipe(
        shards.folder, stages={"finetune": part}, model__depth=1, data__val=None, log={"tensorboard": False},
        faults={"on_non_finite": "skip"},
    ).model_copy(update={"run_dir": str(tmp_path / "run")})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(recipe, hooks=[NotFiniteAt(), KilledAfter5()])
    train(recipe, hooks=[NotFiniteAt()])
    recorded = read_anomalies(tmp_path / "run" / "finetune" / "anomalies.jsonl").lines
    assert [line["step"] for line in recorded] == [2, 5]


def test_facts_of_older_checkpoints_do_not_say_whether_a_step_was_taken(tmp_path):
    anomalies = Anomalies(Faults(most_in_a_row=1))
    over(anomalies, "rollback", tmp_path)
    facts = anomalies.facts()
    del facts["taken_since_rollback"]
    resumed = Anomalies(Faults(most_in_a_row=1))
    resumed.restore(facts)
    resumed.checkpoint_due(40)
    over(resumed, "rollback", tmp_path, step=41)


def test_a_record_that_cannot_be_written_is_no_error(tmp_path):
    assert not over(Anomalies(), "skip", tmp_path / "nowhere").save
