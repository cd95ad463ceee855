"""Batch norm's statistics under every strategy: alike on all ranks, as the formula has them, unmoved by a bad step."""

from __future__ import annotations

import json

import pytest
import torch

from livt_scale import optim
from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.recipe import Model, Parallel
from livt_scale.distributed.batchnorm import WithBatchNorm, running_statistics
from livt_scale.distributed.world import World
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.classifier import build_classifier
from tests.distributed.strategies import Job, Kind, train_all

FEW = {  # three steps of a whole ResNet-18 on very small images
    "model.size": "resnet18",
    "model.image_px": 8,
    "model.patch_px": None,
    "stages.pretrain": None,
    "stages.finetune.layer_decay": 1.0,
    "stages.finetune.global_batch": 240,
    "stages.finetune.micro_batch": 60,
    "stages.finetune.clip_grad": None,
    "faults.digest_every_steps": 1,
    "checkpoint.every_steps": 1,
}


def a_strategy(precision="fp32"):
    torch.manual_seed(0)
    model = build_classifier(Model(size="resnet18", image_px=12, channels=1), num_classes=4, drop_path=0.0)

    def groups(model):
        return optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=None)

    return make_strategy(Parallel(precision=precision), model, groups, betas=(0.9, 0.99), world=World())


def forward(strategy, seed, *, bad=False):
    images = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    loss = strategy.call(images, last=True).logsumexp(dim=1).mean()
    strategy.backward(loss * (float("nan") if bad else 1.0), last=True)


def test_a_model_without_batch_norm_is_left_alone():
    model = build_classifier(Model(size="vit_micro", image_px=28), num_classes=4, drop_path=0.0)

    def groups(model):
        return optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.75)

    strategy = make_strategy(Parallel(), model, groups, betas=(0.9, 0.99), world=World())
    assert not isinstance(strategy, WithBatchNorm)


@pytest.mark.parametrize("how", ["discarded", "refused by its gradient"])
def test_a_step_that_is_not_taken_leaves_no_trace_in_the_statistics(how):
    strategy, plain = a_strategy(), a_strategy()
    for one in (strategy, plain):
        forward(one, 1)
        assert one.update(0.01, max_norm=None).applied
    before = {name: tensor.clone() for name, tensor in strategy.state().items()}
    forward(strategy, 2, bad=True)
    moved = [name for name, tensor in strategy.state().items() if not torch.equal(tensor, before[name])]
    assert any("running_var" in name for name in moved)
    if how == "discarded":
        strategy.discard()
    else:
        assert not strategy.update(0.01, max_norm=None).applied
    assert all(torch.equal(tensor, before[name]) for name, tensor in strategy.state().items())
    for one in (strategy, plain):  # and the next step is as if it had not been
        forward(one, 3)
        one.update(0.01, max_norm=None)
    theirs = plain.state()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in strategy.state().items())


def test_what_was_restored_is_what_a_bad_step_goes_back_to():
    strategy = a_strategy()
    state = strategy.state()
    for tensor in running_statistics(strategy.model):
        tensor.fill_(7)
    strategy.restored(state)
    forward(strategy, 1)
    strategy.discard()
    assert all((tensor == 7).all() for tensor in running_statistics(strategy.model))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """One epoch of a ResNet on two ranks by each strategy, the ranks compared bit for bit after every step."""
    folder = tmp_path_factory.mktemp("statistics")
    kinds = [Kind("ddp", 2), Kind("fsdp", 2)]
    jobs = [Job(kind, folder / kind.name, "finetune", FEW) for kind in kinds]
    again = Job(kinds[0], folder / "again", "finetune", FEW, goes_on_from=jobs[0].checkpoint(2))
    train_all([*jobs, again], folder)
    return jobs, again


@pytest.mark.slow
def test_the_strategies_agree_and_a_continued_run_is_the_same_to_the_bit(two_ranks):
    (ddp, fsdp), again = two_ranks
    assert fsdp.losses == pytest.approx(ddp.losses, rel=1e-4)
    ours, theirs = read_tensors(again.checkpoint(3)), read_tensors(ddp.checkpoint(3))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    sharded = read_tensors(fsdp.checkpoint(3))
    name = "model.layer4.1.bn2.running_var"
    torch.testing.assert_close(sharded[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert json.loads((ddp.run_dir / "finetune" / "status.json").read_text())["state"] == "done"
