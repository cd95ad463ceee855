"""The claims as grids of runs: what is shared is trained once, and arms differ in what their claim is about."""

from pathlib import Path

import pytest

from livt_scale.errors import UsageError
from livt_scale.losses import LOSSES
from livt_scale.recipe import learnt_from
from livt_scale.study import claims
from livt_scale.study.claims import CLAIMS, SETTINGS, epochs_of_equal_compute, loss_sets, runs_of
from livt_scale.study.grid import Run, in_order

ALL = [(claim, on) for claim in CLAIMS for on in SETTINGS]


def runs(claim, on, seeds=(0, 1)):
    return [run for of in runs_of(CLAIMS[claim], SETTINGS[on], seeds=seeds, sets={}).values() for run in of]


@pytest.mark.parametrize(("claim", "on"), ALL)
def test_every_run_of_every_claim_is_a_recipe_that_can_be_and_every_question_is_about_its_arms(claim, on, tmp_path):
    for run in in_order(runs(claim, on, seeds=(0,))):
        assert run.stage in run.load(tmp_path).stage_names
    arms = {arm.name for arm in CLAIMS[claim].arms(SETTINGS[on])}
    asks = CLAIMS[claim].asks(SETTINGS[on])
    assert asks
    assert {ask.better for ask in asks} | {ask.worse for ask in asks} <= arms


@pytest.mark.parametrize("on", SETTINGS)
def test_what_two_claims_have_in_common_is_trained_once(on):
    every = [run for claim in CLAIMS for run in runs(claim, on)]
    ordered = in_order(every)
    assert len({run.name for run in ordered}) == len(ordered) < len(every)
    at = {run.name: k for k, run in enumerate(ordered)}
    assert all(run.after is None or at[run.after] < at[run.name] for run in ordered)


def test_the_arms_of_the_losses_differ_in_the_loss_and_in_what_it_cannot_take_alone(tmp_path):
    (first, *others) = [r for r in runs("losses", "fashion_mnist_lt", seeds=(0,)) if r.stage == "finetune"]
    base = learnt_from(first.load(tmp_path), "finetune")
    for run in others:
        own = learnt_from(run.load(tmp_path), "finetune")
        differs = {path.removeprefix("stages.finetune.") for path in base if base[path] != own[path]}
        assert all(path.startswith("loss.") or path in ("mixup", "cutmix", "smoothing") for path in differs), differs
        assert run.after == first.after, "one pretraining for all"


def test_every_loss_of_the_paper_is_an_arm():
    paper = {"bal_bce", "bce", "ce", "bal_ce", "cb_ce", "ldam", "mislas", "lade"}
    assert set(claims.LOSSES) == paper <= LOSSES.keys()
    assert loss_sets("bal_bce") == {}


def test_equal_compute_from_scratch_is_no_less_than_both_stages():
    setting = SETTINGS["fashion_mnist_lt"]
    recipe = Run("x", setting.recipe).load(Path("/nowhere"))
    first = claims.mae_flops(recipe.model, mask_ratio=recipe.stages.pretrain.mask_ratio).train
    second = claims.classifier_flops(recipe.model, num_classes=10).train
    both = recipe.stages.pretrain.epochs * first + recipe.stages.finetune.epochs * second
    assert both <= epochs_of_equal_compute(setting) * second < both + second


def test_two_runs_of_one_name_that_differ_are_refused():
    with pytest.raises(UsageError, match="two different runs"):
        in_order([Run("a", Path("r"), {"seed": 0}), Run("a", Path("r"), {"seed": 1})])
    with pytest.raises(UsageError, match="none of the runs"):
        in_order([Run("a", Path("r"), after="b")])
