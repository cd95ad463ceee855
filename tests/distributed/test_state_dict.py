from __future__ import annotations

import pytest
import torch
from torch import nn

from livt_scale.checkpoint.load import Position, Saver, load
from livt_scale.distributed.state_dict import collect, plain_name, restore
from livt_scale.util.errors import CheckpointMismatch


class Net(nn.Module):
    """A tied weight, a frozen parameter, persistent and other buffers, and a parameter that gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 6, bias=False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight
        self.positions = nn.Parameter(torch.randn(6), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.embed(x) + self.positions).relu())


def trained(seed: int, *, fused: bool = True, lr: float = 1e-2, decay: float = 0.1):
    torch.manual_seed(seed)
    model = Net()
    groups = [
        {"params": [model.embed.weight], "weight_decay": decay, "lr": lr},
        {"params": [*model.norm.parameters(), model.unused], "weight_decay": 0.0, "lr": lr / 3},
    ]
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused)


def run(model, optimizer, steps) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_continued_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, fused, before):
    whole = trained(1, fused=fused)
    run(*whole, range(6))
    first = trained(1, fused=fused)
    run(*first, range(before))
    with Saver(tmp_path, mode="async") as saver:
        saver.save(collect(*first), position=Position(0, before), facts={})
    second = trained(2, fused=fused)  # other weights, and an optimizer that has not stepped
    into = collect(*second)
    load(tmp_path / f"step-{before:08d}", into)
    restore(*second, into)
    run(*second, range(before, 6))
    ours, theirs = collect(*second), collect(*whole)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_zero_moments_of_an_optimizer_that_has_not_stepped_change_nothing():
    plain, collected = trained(1), trained(1)
    collect(*collected)
    run(*plain, range(3))
    run(*collected, range(3))
    for name, tensor in collect(*plain).items():
        assert torch.equal(tensor, collect(*collected)[name]), name


def test_rate_and_decay_are_the_callers_not_the_checkpoints():
    saved = trained(1)
    run(*saved, range(2))
    other = trained(2, lr=5e-3, decay=0.3)
    restore(*other, collect(*saved))
    assert [(g["lr"], g["weight_decay"]) for g in other[1].param_groups] == [(5e-3, 0.3), (5e-3 / 3, 0.0)]
    assert other[1].state[other[0].embed.weight]["step"] == 2


def test_the_names_are_those_of_the_bare_model():
    model, optimizer = trained(1)
    names = collect(model, optimizer).keys()
    assert {n.removeprefix("model.") for n in names if n.startswith("model.")} == set(model.state_dict())
    optimized = {n.removesuffix(".step") for n in names if n.endswith(".step")}
    assert optimized == {"optim.embed.weight", "optim.norm.weight", "optim.norm.bias", "optim.unused"}
    assert "model.scratch" not in names
    assert collect(model).keys() == {n for n in names if n.startswith("model.")}


def test_wrappers_leave_no_trace_in_the_names():
    class Wrapped(nn.Module):
        """As torch.compile and torch's checkpoint_wrapper name what they wrap."""

        def __init__(self, inner: nn.Module, name: str) -> None:
            super().__init__()
            self.add_module(name, inner)

    model = Wrapped(nn.Sequential(Wrapped(nn.Linear(2, 2), "_checkpoint_wrapped_module")), "_orig_mod")
    assert collect(model).keys() == {"model.0.weight", "model.0.bias"}
    assert plain_name("blocks.0._orig_mod.attn.module.weight") == "blocks.0.attn.module.weight"


def test_the_collected_tensors_are_the_live_ones():
    model, optimizer = trained(1)
    flat = collect(model, optimizer)
    flat["model.positions"].fill_(7)
    flat["optim.unused.exp_avg"].fill_(7)
    assert (model.positions == 7).all()
    assert (optimizer.state[model.unused]["exp_avg"] == 7).all()


def test_a_state_of_another_model_is_refused_whole():
    model, optimizer = trained(1)
    flat = {name: tensor + 1 for name, tensor in collect(model, optimizer).items()}
    flat["model.other"] = flat.pop("model.unused")
    flat["model.positions"] = torch.zeros(7)
    with pytest.raises(CheckpointMismatch, match=r"missing \['model.unused'\].*model.other.*model.positions"):
        restore(model, optimizer, flat)
    assert torch.equal(collect(model)["model.norm.weight"], torch.ones(6))
