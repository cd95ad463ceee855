"""Runs that train a few parameters: one loss curve under ddp and fsdp, resumed bit for bit, exported for others."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import livt_scale
from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.load import load_recipe
from livt_scale.export.peft import export_peft
from livt_scale.export.write_export import export_run
from livt_scale.models.mae import build_mae
from livt_scale.plan.memory import Spread
from livt_scale.plan.parameters import stage_weights
from livt_scale.plan.stage_plan import checkpoint_bytes
from livt_scale.train.load_trained import load_trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import ExportError, UsageError
from tests.distributed.strategies import SMALL, Job, Kind, train_all
from tests.timm_families import FAMILIES
from tests.whole_runs import REPO

PROBE = REPO / "recipes" / "fashion_mnist_lt" / "linear_probe.yaml"
METHODS = {
    "lora": "{name: lora, rank: 4, dropout: 0.1}",
    "adaptformer": "{name: adaptformer, bottleneck: 8}",
    "vpt": "{name: vpt, prompts: 3}",
    "bitfit": "bitfit",
    "layernorm": "layernorm",
}
SINGLE, DDP, FSDP = Kind("ddp", 1), Kind("ddp", 2), Kind("fsdp", 2)
RECOMPUTED = Kind("fsdp", 2, options=(("activation_checkpointing", True),))
Jobs = dict[str, Job]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Ten steps of each method: alone, on two ranks under ddp and fsdp, and resumed after five steps."""
    folder = tmp_path_factory.mktemp("tuned")
    model = load_recipe(PROBE, sets=[f"{k}={v}" for k, v in SMALL.items()] + ["model.size=vit_ti"]).model
    torch.manual_seed(0)
    save_file(build_mae(model, norm_pix=True, mask_ratio=0.75).state_dict(), folder / "mae.safetensors")
    usual = {**SMALL, "stages.pretrain": "null", "stages.finetune.init": "weights", "stages.finetune.base_lr": 0.02,
             "stages.finetune.weights": folder / "mae.safetensors", "stages.finetune.layer_decay": 1}  # fmt: skip
    found: Jobs = {}

    def job(name: str, kind: Kind, train: str, goes_on_from: Path | None = None, **more: object) -> None:
        sets = {**usual, "stages.finetune.train": train, **more}
        found[name] = Job(kind, folder / name, "finetune", sets, goes_on_from)

    for method, train in METHODS.items():
        job(method, SINGLE, train)
        job(f"{method} fsdp", FSDP, train)
        job(f"{method} again", FSDP, train, found[f"{method} fsdp"].checkpoint(5))
    job("lora ddp", DDP, METHODS["lora"])
    job("lora recomputed", RECOMPUTED, METHODS["lora"])
    job("lora fsdp from alone", FSDP, METHODS["lora"], found["lora"].checkpoint(5))
    job("lora ddp from fsdp", DDP, METHODS["lora"], found["lora fsdp"].checkpoint(5))
    job("lora ema", DDP, METHODS["lora"], **{"stages.finetune.ema": "{decay: 0.9}"})
    train_all(list(found.values()), folder, timeout_s=800)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_follow_one_process(jobs: Jobs, method: str) -> None:
    alone, fsdp = jobs[method], jobs[f"{method} fsdp"]
    assert len(alone.losses) == 10
    assert alone.losses[-1] < alone.losses[0]
    assert fsdp.losses == pytest.approx(alone.losses, rel=1e-5)
    assert fsdp.norms == pytest.approx(alone.norms, rel=1e-3)


def test_other_strategies_follow_and_resume_from_each_other(jobs: Jobs) -> None:
    alone = jobs["lora"].losses
    for name in ("lora ddp", "lora recomputed", "lora ema"):
        assert jobs[name].losses == pytest.approx(alone, rel=1e-5), name
    for name in ("lora fsdp from alone", "lora ddp from fsdp"):
        assert jobs[name].losses == pytest.approx(alone[5:], rel=1e-5), name


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_resumes_bit_for_bit(jobs: Jobs, method: str) -> None:
    whole, again = jobs[f"{method} fsdp"], jobs[f"{method} again"]
    assert again.losses == whole.losses[5:]
    ours, theirs = read_tensors(again.checkpoint(10)), read_tensors(whole.checkpoint(10))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_moves_and_has_moments_and_the_checkpoint_is_as_planned(jobs: Jobs, method: str) -> None:
    job = jobs[method]
    early, late = (read_tensors(job.checkpoint(step)) for step in (5, 10))
    recipe = load_recipe(job.run_dir / "recipe.yaml")
    planned = stage_weights(recipe, "finetune", num_classes=10)
    trained = {w.name for w in planned if w.trained}
    moved = {n.removeprefix("model.") for n in late if n.startswith("model.") and not torch.equal(early[n], late[n])}
    assert moved == trained
    assert {name.split(".", 1)[1].rpartition(".")[0] for name in late if name.startswith("optim.")} == trained
    saved = sum(f.stat().st_size for f in job.checkpoint(5).rglob("*") if f.is_file())
    assert saved == pytest.approx(checkpoint_bytes(planned, Spread("ddp", 1, "fp32", 72)), rel=0.06)


def images() -> torch.Tensor:
    return torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["lora", "bitfit", "layernorm"])
def test_timm_opens_the_merged_export_with_equal_logits(jobs: Jobs, method: str, tmp_path: Path) -> None:
    live = load_trained(jobs[method].run_dir, merged=False).model
    export_run(jobs[method].run_dir, tmp_path / "export")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    with torch.inference_mode():
        expected = live(images())
        assert (theirs(images()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("method", ["adaptformer", "vpt"])
def test_what_cannot_be_merged_is_exported_for_ourselves(jobs: Jobs, method: str, tmp_path: Path) -> None:
    run = jobs[method].run_dir
    with pytest.raises(ExportError) as caught:
        export_run(run, tmp_path / "export")
    assert "--to livt" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="peft opens adapters of LoRA"):
        export_peft(run, tmp_path / "export")
    export_run(run, tmp_path / "export", for_timm=False)
    with torch.inference_mode():
        assert torch.equal(open_trained(tmp_path / "export").model(images()), load_trained(run).model(images()))
    assert livt_scale.load(tmp_path / "export").class_names == livt_scale.load(run).class_names


@pytest.mark.parametrize("name", ["lora", "lora ema"])
def test_peft_opens_the_adapter_on_the_base(jobs: Jobs, name: str, tmp_path: Path) -> None:
    weights = "ema" if name == "lora ema" else "raw"
    run = jobs[name].run_dir
    export_peft(run, tmp_path / "adapter", base=tmp_path / "base", weights=weights)
    export_peft(run, tmp_path / "adapter", weights=weights)  # replaces its own
    base = timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True)
    opened = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.inference_mode():
        expected = load_trained(run, merged=False, weights=weights).model(images())
        assert (opened(images()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    trained = [w for w in stage_weights(load_recipe(run / "recipe.yaml"), "finetune", num_classes=10) if w.trained]
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(w.numel for w in trained)
    with pytest.raises(ExportError, match="an export for peft"):
        open_trained(tmp_path / "adapter")


def test_a_dinov2_of_timm_is_tuned_and_opened_by_peft_too(tmp_path: Path) -> None:
    model = {**FAMILIES["dinov2"], "channels": 1}
    network = timm.create_model(model["timm"], img_size=28, in_chans=1, num_classes=10, **model["args"])
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    sets = {f"model.{name}": "null" for name in ("size", "width", "heads", "depth", "patch_px")}
    sets |= {"model": model, "stages.pretrain": "null", "stages.finetune.init": "weights",
             "stages.finetune.weights": tmp_path / "weights.safetensors", "stages.finetune.train": "lora"}  # fmt: skip
    jobs = [Job(kind, tmp_path / kind.name, "finetune", sets) for kind in (SINGLE, FSDP)]
    train_all(jobs, tmp_path, timeout_s=600)
    assert jobs[1].losses == pytest.approx(jobs[0].losses, rel=1e-5)
    export_run(jobs[1].run_dir, tmp_path / "merged")
    export_peft(jobs[1].run_dir, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(network, str(tmp_path / "adapter")).eval()
    merged = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(opened(images()), merged(images()), rtol=1e-5, atol=1e-5)
