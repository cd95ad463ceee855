"""A run that starts from weights: what it begins with, what stands in its lineage, what a recipe cannot say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from livt_scale.checkpoint.load import Position, Retention, Saver
from livt_scale.config.recipe import Recipe, digest, learnt_from
from livt_scale.distributed.state_dict import collect
from livt_scale.distributed.world import World
from livt_scale.export.write_export import export_run
from livt_scale.models.mae import build_mae
from livt_scale.train.finetune import initial_classifier
from livt_scale.train.pretrain import pretrain_task
from livt_scale.train.resume_rules import check_same
from livt_scale.train.run_dir import Status
from livt_scale.train.train_state import run_facts
from livt_scale.util.errors import CheckpointMismatch, WeightsError
from livt_scale.weights.importer import import_weights
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

DECODER = {"width": 16, "depth": 1, "heads": 2}


def recipe_from(weights: Path | None, *, stage: str = "finetune", **model: Any) -> Recipe:
    tree = tiny_recipe(decoder=DECODER, **model).model_dump(mode="json")
    part = {"global_batch": 8, "micro_batch": 8, "epochs": 2, "warmup_epochs": 0}
    part |= {} if weights is None else {"weights": str(weights)}
    tree["stages"] = {stage: part | ({"init": "weights"} if stage == "finetune" and weights else {})}
    return Recipe.model_validate(tree)


def mae_file(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    mae = build_mae(recipe_from(None, stage="pretrain").model, norm_pix=True, mask_ratio=0.75)
    save_file(mae.state_dict(), folder / f"mae-{seed}.safetensors")
    return folder / f"mae-{seed}.safetensors"


def test_fine_tuning_and_pretraining_begin_with_the_weights_and_name_them(tmp_path: Path) -> None:
    file = mae_file(tmp_path, seed=1)
    import_weights(file, tmp_path / "imported", decoder_heads=2)
    train = tiny_shards(tmp_path, {"a": 5, "b": 3})
    for start in (file, tmp_path / "imported"):
        model, origin = initial_classifier(recipe_from(start), num_classes=2, run_dir=tmp_path / "run")
        torch.manual_seed(1)
        truth = build_mae(recipe_from(None, stage="pretrain").model, norm_pix=True, mask_ratio=0.75).state_dict()
        assert torch.equal(model.blocks[1].mlp.fc2.weight, truth["blocks.1.mlp.fc2.weight"])
        assert origin is not None
        assert len(origin["recipe_digest"]) == 64
        task = pretrain_task(recipe_from(start, stage="pretrain"), train, world=World())
        assert all(torch.equal(tensor, truth[name]) for name, tensor in task.model.state_dict().items())
        assert task.origin == origin


def test_a_continued_run_with_another_file_is_refused_and_the_same_file_elsewhere_is_not(tmp_path: Path) -> None:
    train = tiny_shards(tmp_path, {"a": 5, "b": 3})
    one, other = mae_file(tmp_path, seed=1), mae_file(tmp_path, seed=2)
    moved = Path(shutil.copy(one, tmp_path / "moved.safetensors"))

    def facts(file: Path) -> dict[str, Any]:
        recipe = recipe_from(file)
        _, origin = initial_classifier(recipe, num_classes=2, run_dir=tmp_path)
        return run_facts(recipe, "finetune", train, strategy="ddp", origin=origin)

    assert check_same(facts(moved), facts(one), tmp_path) == []
    with pytest.raises(CheckpointMismatch, match="init"):
        check_same(facts(other), facts(one), tmp_path)


def pretrained_run(run_dir: Path) -> dict[str, torch.Tensor]:
    recipe = recipe_from(None, stage="pretrain")
    mae = build_mae(recipe.model, norm_pix=True, mask_ratio=0.75)
    learnt = learnt_from(recipe, "pretrain")
    facts = {"stage": "pretrain", "recipe": recipe.model_dump(mode="json"), "learnt_from": learnt}
    facts["recipe_digest"] = digest(learnt)
    with Saver(run_dir / "pretrain" / "checkpoints", mode="sync", retention=Retention(keep_last=1)) as saver:
        saver.save(collect(mae), position=Position(epoch=2, step=40), facts=facts, score=None, final=True)
    Status(run_dir / "pretrain", stage="pretrain", writes=True).write("done", step=40, total_steps=40)
    return dict(mae.state_dict())


def test_another_runs_pretraining_starts_a_fine_tuning_at_a_larger_size(tmp_path: Path) -> None:
    state = pretrained_run(tmp_path / "run-28")
    recipe = recipe_from(tmp_path / "run-28", image_px=48)
    model, origin = initial_classifier(recipe, num_classes=4, run_dir=tmp_path / "run-48")
    assert model.pos_embed.shape == (1, 1 + 12**2, 96)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert origin is not None
    assert origin["position"] == {"epoch": 2, "step": 40}
    with pytest.raises(WeightsError, match="3 heads, the model 4"):
        initial_classifier(recipe_from(tmp_path / "run-28", heads=4), num_classes=4, run_dir=tmp_path)


def test_an_export_starts_a_run_with_its_head(tmp_path: Path) -> None:
    live = tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))[40]
    export_run(tmp_path / "run", tmp_path / "export")
    tree = recipe_from(tmp_path / "export").model_dump()
    kept = Recipe.model_validate(tree | {"stages": {"finetune": tree["stages"]["finetune"] | {"keep_head": True}}})
    model, with_head = initial_classifier(kept, num_classes=4, run_dir=tmp_path)
    assert torch.equal(model.head.weight, live.head.weight)
    model, without = initial_classifier(recipe_from(tmp_path / "export"), num_classes=4, run_dir=tmp_path)
    assert not torch.equal(model.head.weight, live.head.weight)
    assert with_head is not None
    assert without is not None
    assert with_head["recipe_digest"] != without["recipe_digest"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"finetune": {"init": "weights"}}, "weights names no file"),
        ({"finetune": {"init": "scratch", "weights": "x"}}, "weights has no effect with init 'scratch'"),
        ({"finetune": {"init": "scratch", "keep_head": True}}, "keep_head has no effect"),
        ({"pretrain": {}, "finetune": {"init": "weights", "weights": "x"}}, "pretrain would be of no use"),
    ],
)
def test_what_contradicts_itself_in_a_recipe_is_an_error(stages: dict[str, Any], said: str) -> None:
    tree = tiny_recipe().model_dump(mode="json") | {"stages": stages}
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate(tree)
