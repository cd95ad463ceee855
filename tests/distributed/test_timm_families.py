"""Ten families of timm, each small: one loss curve under three strategies, a resume to the bit, timm's own logits."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from livt_scale.checkpoint.load import read_tensors
from livt_scale.export.write_export import export_run
from livt_scale.plan.parameters import weights_of
from livt_scale.train.open_trained import load_export
from tests.distributed.strategies import Job, Kind, train_all
from tests.timm_families import FAMILIES, family

DDP, FSDP, ZERO2 = Kind("ddp", 2), Kind("fsdp", 2), Kind("zero2", 2)
SETS = {
    "stages.pretrain": "null",
    "stages.finetune.layer_decay": 0.75,
    "stages.finetune.drop_path": 0.2,
    "model.size": "timm",
    "model.patch_px": "null",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[tuple[str, str], Job]:
    """Ten steps of each family under each strategy; the first five under one of them again, and then on."""
    folder = tmp_path_factory.mktemp("families")
    found: dict[tuple[str, str], Job] = {}
    for name, part in FAMILIES.items():
        sets = {**SETS, **{f"model.{field}": json.dumps(value) for field, value in part.items()}}
        sets["model.timm"] = part["timm"]

        def job(what: str, kind: Kind, start=None, *, name=name, sets=sets) -> None:
            found[name, what] = Job(kind, folder / f"{name}-{what}", "finetune", sets, start)

        for kind in (DDP, FSDP, ZERO2):
            job(kind.strategy, kind)
        again = FSDP if name in ("swin", "siglip", "efficientnet") else DDP
        job("again", again, found[name, again.strategy].checkpoint(5))
    train_all(list(found.values()), folder, timeout_s=800)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_strategies_follow_one_curve(jobs, name):
    ddp = jobs[name, "ddp"]
    assert len(ddp.losses) == 10
    assert ddp.losses[-1] < ddp.losses[0]
    for other in ("fsdp", "zero2"):
        assert jobs[name, other].losses == pytest.approx(ddp.losses, rel=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_resumed_run_is_the_same_to_the_bit(jobs, name):
    again = jobs[name, "again"]
    first = jobs[name, again.kind.strategy]
    assert again.losses == first.losses[5:]
    before, after = (read_tensors(job.checkpoint(10)) for job in (first, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_opens_the_export_and_gives_its_logits(jobs, name, tmp_path):
    job = jobs[name, "fsdp"]
    export_run(job.run_dir, tmp_path / "out")
    ours, info = load_export(tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(3, *ours.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs(images))
    assert info.mean == tuple(theirs.pretrained_cfg["mean"])
    planned = weights_of(family(name), "finetune", num_classes=10)
    assert sum(weight.numel for weight in planned) == sum(parameter.numel() for parameter in theirs.parameters())
