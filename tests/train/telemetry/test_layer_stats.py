"""Norms by layer group against plain sums, and the same numbers under a strategy that shards."""

from __future__ import annotations

import json

import pytest
import torch

from livt_scale.config.recipe import Model
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.train.telemetry.layer_stats import NAMES, LayerGroups, LayerStats, group_of
from tests.train.loops import a_step, idle_loop, started, take
from tests.whole_runs import Livt, metrics

TINY = Model(size="vit_micro", image_px=28, channels=1, decoder={"width": 32, "depth": 1, "heads": 2})


def test_every_parameter_of_both_networks_has_a_group_that_says_where_it_lies():
    mae = {group_of(name) for name, _ in build_mae(TINY, norm_pix=True, mask_ratio=0.75).named_parameters()}
    blocks = {f"block_{k:02d}" for k in range(4)}
    assert mae == {"embed", *blocks, "norm", "decoder_embed", "decoder_block_00", "decoder_pred"} | {
        group_of("decoder_pos_embed")
    }
    classifier = build_classifier(TINY, num_classes=10, drop_path=0.0)
    assert {group_of(name) for name, _ in classifier.named_parameters()} == {"embed", *blocks, "head"}


def test_norms_are_those_of_gradient_weights_and_change():
    torch.manual_seed(0)
    model = build_classifier(TINY, num_classes=10, drop_path=0.0)
    model(torch.rand(4, 1, 28, 28)).logsumexp(1).sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = LayerGroups(model)
    assert groups.after() == {}  # a bad loss ended the step
    groups.before(scale=4.0)
    gradients = {name: p.grad.clone() / 4 for name, p in model.named_parameters() if p.grad is not None}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    told = groups.after()
    for group, row in told.items():
        names = [n for n, p in model.named_parameters() if group_of(n) == group and p.requires_grad]
        after = dict(model.named_parameters())

        def norm(tensors):
            return float(torch.cat([t.detach().flatten() for t in tensors]).norm())

        assert row["grad_norm"] == pytest.approx(norm([gradients[n] for n in names]), rel=1e-4)
        assert row["weight_norm"] == pytest.approx(norm([after[n] for n in names]), rel=1e-4)
        change = norm([after[n] - before[n] for n in names])
        assert row["update_ratio"] == pytest.approx(change / norm([after[n] for n in names]), rel=1e-3)


def test_only_the_steps_that_are_logged_have_them_and_what_is_not_finite_is_null():
    model = build_classifier(TINY, num_classes=10, drop_path=0.0)
    model(torch.rand(4, 1, 28, 28)).logsumexp(1).sum().backward()
    model.fc_norm.weight.grad[0] = torch.inf
    loop = idle_loop(LayerStats(), total=4, epoch=4, log_every=2, model=model, scaler=lambda: {"scale": 2.0})
    steps = [a_step(number) for number in (1, 2, 3)]
    with started(loop):
        for step in steps:
            take(loop, step)
    assert steps[0].metrics == steps[2].metrics == {}
    layers = steps[1].metrics["layers"]
    assert set(layers["block_00"]) == set(NAMES)
    assert layers["head"]["grad_norm"] is None
    unscaled = LayerGroups(model)
    unscaled.before(scale=1.0)
    assert layers["block_00"]["grad_norm"] == pytest.approx(unscaled.after()["block_00"]["grad_norm"] / 2)


@pytest.mark.slow
def test_a_sharded_run_has_the_same_layers_as_a_single_process(tmp_path):
    livt = Livt(tmp_path)
    sets = {
        "log__layer_groups": True,
        "log__every_steps": 3,
        "log__profile_steps": [2, 3],
        "log__profile_ranks": "all",
        "stages__pretrain__epochs": 1,
        "stages__finetune": None,
    }
    livt.train(tmp_path / "one", **sets, parallel__strategy="ddp")
    said = livt.train(tmp_path / "two", **sets, parallel__strategy="fsdp", processes=2)
    one, two = (metrics(tmp_path / run, "pretrain") for run in ("one", "two"))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(one, two, strict=True):
        for group, row in ours["layers"].items():
            assert theirs["layers"][group] == pytest.approx(row, rel=2e-3, abs=1e-7), group
    norms = [row["grad_norm"] for row in one[-1]["layers"].values()]
    assert sum(n**2 for n in norms) > 0
    assert one[0]["communication_s"] == 0.0
    assert two[0]["communication_s"] is None  # gathers and scatters lie in forward and backward
    traces = {p.name for p in (tmp_path / "two" / "pretrain" / "profile").iterdir()}
    assert traces == {f"steps-2-3-rank-{rank}.json.gz" for rank in (0, 1)}
    assert "profile of steps 2 to 3" in said
    assert json.loads((tmp_path / "two/pretrain/metrics.jsonl").read_text().splitlines()[0])["mfu"] is None
