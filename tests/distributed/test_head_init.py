"""A head of class means: the same on two ranks as on one by every kind of strategy, and made only once."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.models.mae import build_mae
from tests.distributed.follow import QUICKSTART
from tests.distributed.strategies import SMALL, TEN_STEPS, Job, Kind, train_all
from tests.whole_runs import spelt

KINDS = (Kind("ddp", 1), Kind("ddp", 2), Kind("fsdp", 2), Kind("zero3", 2))
Jobs = dict[str, Job]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Ten steps each, the first at rate 0: its checkpoint has the head as it begins."""
    folder = tmp_path_factory.mktemp("head_init")
    sets = [f"{name}={spelt(value)}" for name, value in {**TEN_STEPS, **SMALL}.items()]
    torch.manual_seed(0)
    mae = build_mae(load_recipe(QUICKSTART, sets=sets).model, norm_pix=True, mask_ratio=0.75)
    save_file(mae.state_dict(), folder / "mae.safetensors")
    fields = {
        **SMALL, "stages.pretrain": "null", "stages.finetune.init": "weights",
        "stages.finetune.weights": folder / "mae.safetensors", "stages.finetune.head": "cosine",
        "stages.finetune.head_init": "class_means", "stages.finetune.warmup_epochs": 1, "checkpoint.every_steps": 1,
        "checkpoint.keep_last": 12,
        "stages.finetune.loss": "{name: bal_ce}",
    }  # fmt: skip
    found = {kind.name: Job(kind, folder / kind.name, "finetune", fields) for kind in KINDS}
    for name in ("ddp-1", "fsdp-2"):
        job = found[name]
        found[f"{name} again"] = Job(job.kind, folder / f"{name} again", "finetune", fields, job.checkpoint(5))
    train_all(list(found.values()), folder, timeout_s=600)
    return found


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "zero3-2"])
def test_two_ranks_begin_with_the_means_of_one_and_follow_its_curve(jobs: Jobs, name: str) -> None:
    head, alone = (read_tensors(jobs[n].checkpoint(1))["model.head.weight"] for n in (name, "ddp-1"))
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(head, alone, rtol=0, atol=1e-6)
    assert jobs[name].losses == pytest.approx(jobs["ddp-1"].losses, rel=1e-5)


@pytest.mark.parametrize("name", ["ddp-1", "fsdp-2"])
def test_a_resumed_run_does_not_make_the_head_again(jobs: Jobs, name: str) -> None:
    whole, again = jobs[name], jobs[f"{name} again"]
    assert again.losses == whole.losses[5:]
