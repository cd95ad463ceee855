"""A linear probe by LARS: one loss curve on any ranks, bit for bit after a stop, and the same logits for timm."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from livt_scale.checkpoint.load import load, read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.distributed.state_dict import collect
from livt_scale.export.write_export import export_run
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.train.load_trained import load_trained
from tests.distributed.strategies import SMALL, Job, Kind, train_all
from tests.whole_runs import REPO

PROBE = REPO / "recipes" / "fashion_mnist_lt" / "linear_probe.yaml"
SINGLE, DDP, FSDP, LOW = Kind("ddp", 1), Kind("ddp", 2), Kind("fsdp", 2), Kind("fsdp", 2, "fp16")
Jobs = dict[str, Job]
pytestmark = pytest.mark.timeout(700)  # seconds on a quiet machine; one that is shared has taken minutes


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Ten steps each, micro-batches of 18 in a global batch of 72: four of them a step on one rank, two on two."""
    folder = tmp_path_factory.mktemp("probes")
    model = load_recipe(PROBE, sets=[f"{k}={v}" for k, v in SMALL.items()] + ["model.size=vit_ti"]).model
    torch.manual_seed(0)
    save_file(build_mae(model, norm_pix=True, mask_ratio=0.75).state_dict(), folder / "mae.safetensors")
    sets = {
        **SMALL, "stages.pretrain": "null", "stages.finetune.init": "weights",
        "stages.finetune.weights": folder / "mae.safetensors", "stages.finetune.train": "head",
        "stages.finetune.head_norm": "batch", "stages.finetune.optimizer": "lars", "stages.finetune.base_lr": 6.4,
        "stages.finetune.clip_grad": "null", "stages.finetune.layer_decay": 1, "stages.finetune.drop_path": 0,
        "stages.finetune.mixup": 0, "stages.finetune.smoothing": 0, "stages.finetune.loss": "{name: ce}",
        "stages.finetune.weight_decay": 0,
    }  # fmt: skip

    def job(name: str, kind: Kind, goes_on_from: Path | None = None) -> Job:
        return Job(kind, folder / name, "finetune", sets, goes_on_from)

    found = {"alone": job("alone", SINGLE), "fsdp": job("fsdp", FSDP)}
    for name in ("alone", "fsdp"):
        found[f"{name} again"] = job(f"{name} again", found[name].kind, found[name].checkpoint(5))
    found["fsdp from alone"] = job("fsdp from alone", FSDP, found["alone"].checkpoint(5))
    train_all(list(found.values()), folder, timeout_s=600)
    return found


def test_the_loss_curve_and_the_statistics_are_those_of_one_process(jobs: Jobs) -> None:
    alone = jobs["alone"]
    assert len(alone.losses) == 10
    assert alone.losses[-1] < alone.losses[0]
    sums = read_tensors(alone.checkpoint(10))["model.head_norm.sums"]
    assert sums[0].unique().tolist() == [720]
    assert_follows(jobs["fsdp"], alone)
    assert jobs["fsdp from alone"].losses == pytest.approx(alone.losses[5:], rel=1e-5)


def assert_follows(job: Job, alone: Job) -> None:
    assert job.losses == pytest.approx(alone.losses, rel=1e-5)
    assert job.norms == pytest.approx(alone.norms, rel=1e-4)
    ours, sums = (read_tensors(one.checkpoint(10))["model.head_norm.sums"] for one in (job, alone))
    torch.testing.assert_close(ours, sums, rtol=1e-6, atol=1e-3)


@pytest.mark.slow
def test_ddp_and_fp16_follow_too(jobs: Jobs, tmp_path: Path) -> None:
    ddp, fp16 = (Job(kind, tmp_path / kind.name, "finetune", jobs["alone"].sets) for kind in (DDP, LOW))
    train_all([ddp, fp16], tmp_path, timeout_s=600)
    assert_follows(ddp, jobs["alone"])
    assert fp16.losses == pytest.approx(jobs["alone"].losses, rel=2e-2)


@pytest.mark.parametrize("name", ["alone", "fsdp"])
def test_a_stopped_probe_goes_on_bit_for_bit_with_its_momentum_and_statistics(jobs: Jobs, name: str) -> None:
    whole, again = jobs[name], jobs[f"{name} again"]
    assert again.losses == whole.losses[5:]
    ours, theirs = read_tensors(again.checkpoint(10)), read_tensors(whole.checkpoint(10))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert theirs["optim.head.weight.momentum_buffer"].abs().max() > 0


def test_the_head_alone_has_moved_and_has_a_momentum(jobs: Jobs) -> None:
    early, late = (read_tensors(jobs["alone"].checkpoint(step)) for step in (5, 10))
    moved = {name for name in late if name.startswith("model.") and not torch.equal(early[name], late[name])}
    assert moved == {"model.head.weight", "model.head.bias", "model.head_norm.sums"}
    assert {name for name in late if name.startswith("optim.")} == {
        "optim.head.weight.momentum_buffer", "optim.head.bias.momentum_buffer",
    }  # fmt: skip


def test_timm_and_the_trained_model_give_the_same_logits_from_the_export(jobs: Jobs, tmp_path: Path) -> None:
    job = jobs["alone"]
    recipe = load_recipe(job.run_dir / "recipe.yaml")
    live = build_classifier(recipe.model, num_classes=10, drop_path=0.0, head_norm=True).eval()
    load(job.checkpoint(10), collect(live), allow_unexpected=("optim.*",))
    export_run(job.run_dir, tmp_path / "export")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    images = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(theirs(images), live(images))
        assert torch.equal(load_trained(job.run_dir).model(images), live(images))
