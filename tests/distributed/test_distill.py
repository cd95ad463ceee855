"""A ViT that a CNN teaches: one loss curve under every kind of strategy, resumed to the bit, exported for timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.data.shard_set import ShardSet
from livt_scale.export.write_export import export_run
from livt_scale.models.mae import build_mae
from livt_scale.train.load_trained import Weights, load_trained
from tests.distributed.follow import QUICKSTART
from tests.distributed.strategies import SMALL, TEN_STEPS, Job, Kind, train_all
from tests.tiny_run import tiny_recipe, tiny_run
from tests.whole_runs import small_sets, spelt

KINDS = (Kind("ddp", 1), Kind("ddp", 2), Kind("fsdp", 2), Kind("zero2", 2), Kind("zero3", 2))
AGAIN = ("ddp-2", "fsdp-2", "zero2-2")
LOW = (Kind("ddp", 2, "bf16"), Kind("fsdp", 2, "bf16"))
Jobs = dict[str, Job]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Ten steps from a pretrained encoder, re-weighted after half of them; the second half again."""
    folder = tmp_path_factory.mktemp("distill")
    classes = ShardSet.open(small_sets() / "train-lt")
    cnn = tiny_recipe(size="resnet_micro", image_px=28, channels=1)
    counts = tuple(classes.class_counts.tolist())
    tiny_run(folder / "cnn", cnn, steps=(1,), class_names=tuple(classes.manifest.class_names), class_counts=counts)
    export_run(folder / "cnn", folder / "teacher")
    sets = [f"{name}={spelt(value)}" for name, value in {**TEN_STEPS, **SMALL}.items()]
    torch.manual_seed(0)
    mae = build_mae(load_recipe(QUICKSTART, sets=sets).model, norm_pix=True, mask_ratio=0.75)
    save_file(mae.state_dict(), folder / "mae.safetensors")
    fields = {
        **SMALL, "stages.pretrain": "null", "stages.finetune.init": "weights", "stages.finetune.epochs": 2,
        "stages.finetune.weights": folder / "mae.safetensors", "stages.finetune.global_batch": 144,
        "stages.finetune.loss": "{name: bal_ce}", "stages.finetune.drop_path": 0.2,
        "stages.finetune.distill": f"{{teacher: {folder / 'teacher'}, reweight_after: 0.5}}",
    }  # fmt: skip
    found: Jobs = {}
    for kind in KINDS:
        sets = {**fields, "stages.finetune.ema": "{}"} if kind.strategy == "fsdp" else fields
        found[kind.name] = Job(kind, folder / kind.name, "finetune", sets)
        if kind.name in AGAIN:
            again = f"{kind.name} again"
            found[again] = Job(kind, folder / again, "finetune", sets, found[kind.name].checkpoint(5))
    for kind in LOW:
        found[kind.name] = Job(kind, folder / kind.name, "finetune", {**fields, "stages.finetune.epochs": 1})
    train_all(list(found.values()), folder, timeout_s=600)
    return found


@pytest.mark.parametrize("name", [*AGAIN, "zero3-2"])
def test_two_ranks_follow_one(jobs: Jobs, name: str) -> None:
    alone = jobs["ddp-1"].losses
    assert len(alone) == 10
    assert alone[4] < alone[0]
    assert jobs[name].losses == pytest.approx(alone, rel=1e-4)


def test_in_bf16_too(jobs: Jobs) -> None:
    assert jobs["fsdp-2-bf16"].losses == pytest.approx(jobs["ddp-2-bf16"].losses, rel=0.02)


@pytest.mark.parametrize("name", AGAIN)
def test_a_resumed_run_is_the_same_to_the_bit(jobs: Jobs, name: str) -> None:
    whole, again = jobs[name], jobs[f"{name} again"]
    assert again.losses == whole.losses[5:]
    before, after = (read_tensors(job.checkpoint(10)) for job in (whole, again))
    assert before.keys() == after.keys() >= {"model.dist_token", "model.head_dist.weight"}
    assert all(torch.equal(before[each], after[each]) for each in before)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_timm_opens_the_export_and_averages_both_heads(jobs: Jobs, weights: Weights, tmp_path: Path) -> None:
    run = jobs["fsdp-2"].run_dir
    export_run(run, tmp_path / "out", weights=weights)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = load_trained(run, weights=weights).model
    images = torch.randn(3, *ours.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens = ours.forward_features(images)
        mean = (ours.head(tokens[:, 0]) + ours.head_dist(tokens[:, 1])) / 2
        assert torch.equal(theirs(images), ours(images))
        torch.testing.assert_close(ours(images), mean)
