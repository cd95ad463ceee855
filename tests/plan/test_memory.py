"""What the planner says of weights, states and checkpoints against what networks, strategies and runs really hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from livt_scale.config.capabilities import STRATEGIES
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Model
from livt_scale.config.tuning import TrainHead
from livt_scale.distributed.deepspeed import BUCKET
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.models.parameter_efficient import build_tuned
from livt_scale.plan.exact import measure
from livt_scale.plan.memory import (
    GIB,
    ZERO_BUCKET,
    ZERO_REUSE,
    Spread,
    held_bytes,
    offloaded_bytes,
    plan_memory,
)
from livt_scale.plan.parameters import stage_weights, weights_of
from livt_scale.plan.stage_plan import checkpoint_bytes
from tests.distributed.strategies import Job, Kind, train_all
from tests.whole_runs import REPO, free_port

VIT_B = Path(__file__).parents[2] / "recipes" / "imagenet_lt" / "vit_b16.yaml"
SIZES = {
    "vit_micro": Model(size="vit_micro", image_px=28, channels=1),
    "vit_b": Model(size="vit_b"),
    "vit_s of two heads": Model(size="vit_s", distillation_token=True),
    "vit_h at 448 px": Model(size="vit_h", image_px=448),
}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("model", SIZES.values(), ids=SIZES)
def test_weights_are_those_of_the_networks(model, stage):
    with torch.device("meta"):
        if stage == "pretrain":
            network = build_mae(model, norm_pix=True, mask_ratio=0.75)
        else:
            network = build_classifier(model, num_classes=37, drop_path=0.1)
    real = {name: (tuple(p.shape), p.requires_grad) for name, p in network.named_parameters()}
    planned = weights_of(model, stage, num_classes=37)
    assert {w.name: (w.shape, w.trained) for w in planned} == real
    assert not list(network.buffers())


@pytest.mark.parametrize(("size", "px"), [("resnet_micro", 28), ("resnet18", 28), ("resnet18", 96), ("resnet50", 224)])
def test_weights_of_a_resnet_are_those_of_the_network(size, px):
    model = Model(size=size, image_px=px, channels=1)
    with torch.device("meta"):
        network = build_classifier(model, num_classes=37, drop_path=0.1)
    planned = weights_of(model, "finetune", num_classes=37)
    assert {w.name: tuple(w.shape) for w in planned} == {n: tuple(p.shape) for n, p in network.named_parameters()}


def test_a_probes_weights_are_trained_as_the_network_says():
    sets = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w"]
    sets += ["stages.finetune.train=head", "stages.finetune.layer_decay=1", "stages.finetune.drop_path=0"]
    recipe = load_recipe(VIT_B, sets=sets)
    with torch.device("meta"):
        network = build_tuned(recipe.model, num_classes=37, drop_path=0.0, tuning=TrainHead())
    planned = stage_weights(recipe, "finetune", num_classes=37)
    assert {w.name: w.trained for w in planned} == {name: p.requires_grad for name, p in network.named_parameters()}
    assert {w.moments for w in planned} == {2}


def test_the_bucket_is_the_one_that_runs_have():
    assert ZERO_BUCKET == BUCKET


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_ranks_never_hold_more_and_ddp_holds_all(strategy):
    weights = weights_of(Model(), "pretrain", num_classes=1)
    totals = [sum(held_bytes(weights, Spread(strategy, gpus, "fp32", 8))) for gpus in (2, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert (len(set(totals)) == 1) == (strategy == "ddp")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_recomputing_and_smaller_micro_batches_need_less(strategy):
    recipe = load_recipe(VIT_B)
    weights = weights_of(recipe.model, "pretrain", num_classes=1)
    kept, again, half = (
        plan_memory(recipe, "pretrain", weights, Spread(strategy, 8, "bf16", micro, recompute=recompute)).peak
        for micro, recompute in ((64, False), (64, True), (32, False))
    )
    assert again < kept
    assert half < kept
    assert 0.1 < kept / GIB < 80


@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_what_is_offloaded_is_what_the_device_no_longer_holds(strategy, gpus):
    weights = weights_of(Model(), "pretrain", num_classes=1)
    here, away = (Spread(strategy, gpus, "fp32", 8, offload=where) for where in ("none", "cpu"))
    assert sum(held_bytes(weights, here)) == sum(held_bytes(weights, away)) + offloaded_bytes(weights, away)
    assert offloaded_bytes(weights, here) == 0
    kept, grads, moments = held_bytes(weights, away)
    assert grads == moments == 0
    whole = 4 * sum(w.numel for w in weights)
    assert (kept == whole) == (strategy in ("zero1", "zero2"))
    assert kept == whole or kept < whole / 100


@pytest.mark.slow
def test_weights_stay_gathered_as_long_as_deepspeed_keeps_them():
    """In a process of its own: deepspeed changes torch, and warns."""
    code = "from deepspeed.runtime.zero.config import DeepSpeedZeroConfig as C\nprint(C().max_reuse_distance)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said.splitlines()[-1]) == ZERO_REUSE  # our configuration keeps the default


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_saved_bytes_on_two_ranks_are_those_that_were_planned(tmp_path):
    jobs = [Job(Kind(name, 2), tmp_path / name, sets={"model.decoder.depth": 2}) for name in STRATEGIES]
    train_all(jobs, tmp_path, timeout_s=600)
    for job in jobs:
        recipe = load_recipe(job.run_dir / "recipe.yaml")
        weights = weights_of(recipe.model, "pretrain", num_classes=1)
        planned = checkpoint_bytes(weights, Spread(job.kind.strategy, 2, "fp32", 60))
        saved = sum(f.stat().st_size for f in job.checkpoint(5).rglob("*") if f.is_file())
        assert saved == pytest.approx(planned, rel=0.01), job.kind.name


def on_two_ranks(script: str, *words: str) -> dict[str, int]:
    """What rank 0 of two processes of `script` says last."""
    port, path = str(free_port()), Path(__file__).with_name(script)
    processes = [
        subprocess.Popen(
            [sys.executable, str(path), *words],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=1500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found: dict[str, int] = json.loads(said[0].strip().splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("names", [("ddp", "fsdp"), ("zero1",), ("zero2",), ("zero3",)], ids="-".join)
def test_what_strategies_hold_on_two_ranks_is_what_was_planned(names):
    weights = weights_of(Model(size="vit_ti", image_px=64), "pretrain", num_classes=1)
    measured = on_two_ranks("held.py", *names)
    for name in names:
        planned = sum(held_bytes(weights, Spread(name, 2, "fp32", 2)))
        assert measured[name] == pytest.approx(planned, rel=0.01), name


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["kept", "recomputed"])
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_the_peak_of_a_step_on_two_ranks_is_near_the_planned_one(strategy, blocks):
    """DeepSpeed's engines, which nothing measures without memory.

    Not fsdp: on CPUs it is gloo's pace that says how many blocks' gradients wait to be reduced; --exact measures it.
    """
    peak = on_two_ranks("peak.py", strategy, blocks)
    print(f"{strategy}, {blocks}: {peak['planned'] / peak['measured'] - 1:+.1%}")  # for -s
    assert peak["planned"] == pytest.approx(peak["measured"], rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("train", ["lora", "bitfit"])
def test_the_peak_of_a_tuned_network_is_near_the_planned_one(train, strategy):
    sets = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w", "model.size=vit_s"]
    sets += ["parallel.compile=false", "stages.finetune.layer_decay=1", f"stages.finetune.train={train}"]
    recipe = load_recipe(VIT_B, sets=sets)
    spread = Spread(strategy, 2, "bf16", 64)
    measured = measure(recipe, "finetune", spread, num_classes=100, bound_s=1500)
    weights = stage_weights(recipe, "finetune", num_classes=100)
    assert measured.grads == held_bytes(weights, spread)[1]
    assert plan_memory(recipe, "finetune", weights, spread).peak == pytest.approx(measured.peak, rel=0.05)
