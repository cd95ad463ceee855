"""An export is the live model, for timm and for us; it is written whole, and over nothing but itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config

from livt_scale.config.recipe import Recipe
from livt_scale.export import timm as for_timm
from livt_scale.export.timm import timm_network
from livt_scale.export.write_export import export_run, write_export
from livt_scale.losses import LOSSES
from livt_scale.models.classifier import head_inputs
from livt_scale.train.export_info import CONFIG, WEIGHTS, ExportInfo
from livt_scale.train.load_trained import load_trained, pick_checkpoint
from livt_scale.train.open_trained import load_export, open_trained
from livt_scale.util.errors import CheckpointDamaged, ExportError, RunError, UsageError
from livt_scale.util.outside import sha256_of
from tests.tiny_run import CLASS_COUNTS, CLASS_NAMES, tiny_recipe, tiny_run

HOSTILE = "runs of 'a \"user\"'\nand more"


def logits(model: torch.nn.Module, recipe: Recipe) -> torch.Tensor:
    shape = (3, recipe.model.channels, recipe.model.image_px, recipe.model.image_px)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        return model.eval()(images)


@pytest.mark.parametrize(
    "model", [{}, pytest.param({"size": "resnet_micro"}, marks=pytest.mark.slow)], ids=["vit", "resnet"]
)
def test_a_cosine_head_is_ours_alone_and_timm_reads_the_features_before_it(
    tmp_path: Path, model: dict[str, object]
) -> None:
    tree = tiny_recipe(**model).model_dump()
    tree["stages"]["finetune"] |= {"head": "cosine"}
    recipe = Recipe.model_validate(tree)
    live = tiny_run(tmp_path / "run", recipe, steps=(40,))[40]
    export_run(tmp_path / "run", tmp_path / "out")
    again = open_trained(tmp_path / "out")
    assert torch.equal(logits(again.model, recipe), logits(live, recipe))
    assert again.recipe.stages.finetune.cosine_scale == 25
    bare = timm_network(tmp_path / "out", recipe.model, has_head=False)
    with head_inputs(live) as given:
        logits(live, recipe)
    assert torch.equal(logits(bare, recipe), given[0])
    with pytest.raises((RuntimeError, KeyError)):
        timm_network(tmp_path / "out", recipe.model)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"width": 64, "heads": 2, "depth": 3, "patch_px": 7},
        {"size": "vit_ti", "width": 96, "image_px": 32, "channels": 3, "patch_px": 8},
        {"size": "vit_h", "width": 80, "heads": 5, "image_px": 28, "channels": 2},
        {"distillation_token": True},
    ],
    ids=["micro", "custom", "ti-rgb", "h14", "two heads"],
)
def test_timm_builds_the_same_logits_from_the_folder_alone(tmp_path: Path, model: dict[str, object]) -> None:
    recipe = tiny_recipe(**model)
    run_dir, out = tmp_path / HOSTILE, tmp_path / "exports 'x'" / "tiny"
    live = tiny_run(run_dir, recipe, steps=(40,))[40]
    export_run(run_dir, out)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    read_back, info = load_export(out)
    assert torch.equal(logits(theirs, recipe), logits(live, recipe))
    assert torch.equal(logits(read_back, recipe), logits(live, recipe))
    assert info.class_names == CLASS_NAMES
    assert info.class_counts == CLASS_COUNTS
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_timm_builds_a_resnet_from_the_folder_alone_and_a_small_one_as_the_docs_say(tmp_path: Path) -> None:
    for size, px in (("resnet18", 65), ("resnet18", 28), ("resnet_micro", 28)):
        recipe, run_dir = tiny_recipe(size=size, image_px=px), tmp_path / f"run-{size}-{px}"
        live = tiny_run(run_dir, recipe, steps=(40,))[40]
        live.train()
        for seed in (1, 2):  # statistics of its own
            live(
                torch.randn(4, 1, px, px, generator=torch.Generator().manual_seed(seed)),
                torch.rand(4, recipe.model.num_branches),
            )
        out = tmp_path / f"out-{size}-{px}"
        trained = load_trained(run_dir)
        trained.model.load_state_dict(live.state_dict())
        write_export(trained, out)
        read_back, _ = load_export(out)
        assert torch.equal(logits(read_back, recipe), logits(live, recipe))
        assert torch.equal(logits(timm_network(out, recipe.model), recipe), logits(live, recipe))
        if px == 65:
            assert torch.equal(
                logits(timm.create_model(f"local-dir:{out}", pretrained=True), recipe), logits(live, recipe)
            )
        else:  # another stem than timm makes: loud, never other logits
            with pytest.raises(RuntimeError, match="conv1"):
                timm.create_model(f"local-dir:{out}", pretrained=True)


def test_timm_knows_size_pixels_and_classes(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    export_run(tmp_path / "run", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = resolve_model_data_config(model)
    assert config["input_size"] == (1, 28, 28)
    assert config["interpolation"] == "bicubic"
    assert config["crop_pct"] == 0.875
    assert tuple(config["mean"]) == (0.3,)
    assert tuple(config["std"]) == (0.25,)
    assert tuple(model.pretrained_cfg["label_names"]) == CLASS_NAMES
    other_head = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7)
    assert other_head.head.out_features == 7


def test_the_same_weights_give_the_same_bytes_wherever_the_run_lies(tmp_path: Path) -> None:
    for name in ("one", "another place"):
        tiny_run(tmp_path / name / "run", tiny_recipe(), steps=(40,))
        export_run(tmp_path / name / "run", tmp_path / name / "out")
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "one/out" / file).read_bytes() == (tmp_path / "another place/out" / file).read_bytes()
    assert str(tmp_path) not in (tmp_path / "one/out" / CONFIG).read_text()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_any_run_exports_can_be_opened(tmp_path: Path, loss: str, precision: str) -> None:
    tree = tiny_recipe().model_dump()
    hard = {"smoothing": 0, "mixup": 0, "cutmix": 0}  # all that some losses take
    tree["stages"]["finetune"] |= {"loss": {"name": loss}, **hard}
    recipe = Recipe.model_validate(tree | {"parallel": {"precision": precision}})
    tiny_run(tmp_path / "run", recipe, steps=(40,))
    export_run(tmp_path / "run", tmp_path / "out")
    there = open_trained(tmp_path / "out").recipe
    assert (there.stage("finetune").loss.name, there.parallel.precision) == (loss, precision)


def test_it_says_where_the_weights_come_from(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,), manifest_digest="ab" * 32)
    lineage = export_run(tmp_path / "run", tmp_path / "out").lineage
    assert lineage["checkpoint"] == "step-00000040"
    assert lineage["position"] == {"epoch": 2, "step": 40}
    assert lineage["trained_on"] == "ab" * 32
    assert lineage["learnt_from"]["stages.finetune.loss.name"] == "bal_bce"
    assert lineage["recipe_digest"] == open_trained(tmp_path / "out").weights["recipe_digest"]


def test_the_final_checkpoint_is_taken_unless_another_is_asked_for(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    models = tiny_run(tmp_path, recipe, steps=(40, 80, 120), scores={40: 0.9, 80: 0.7, 120: 0.8})
    for which, step in ((None, 120), ("newest", 120), ("best", 40), ("80", 80)):
        trained = load_trained(tmp_path, which=which)
        assert torch.equal(logits(trained.model, recipe), logits(models[step], recipe))
    with pytest.raises(RunError, match=r"no fine-tuning checkpoint '41'.*step-00000040, step-00000080"):
        pick_checkpoint(tmp_path, which="41")
    with pytest.raises(UsageError, match="best, newest or a step"):
        pick_checkpoint(tmp_path, which="last")


def test_unfinished_fine_tuning_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    tiny_run(tmp_path, tiny_recipe(), steps=(40,), final=False)
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "status.json").write_text('{"state": "done", "step": 900, "total_steps": 900}')
    with pytest.raises(
        RunError, match=r"not ended.*pretrain: done at step 900 of 900.*step-00000040.*choose checkpoint newest"
    ):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_run(tmp_path, tmp_path / "out", which="newest")


def test_a_run_without_fine_tuning_and_a_folder_without_run_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RunError, match="finetune: not started"):
        export_run(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="neither a run nor an export"):
        open_trained(tmp_path / "nothing here")


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    part = max((tmp_path / "run/finetune/checkpoints/step-00000040").glob("*.distcp"), key=lambda p: p.stat().st_size)
    raw = bytearray(part.read_bytes())
    raw[len(raw) // 2] ^= 1
    part.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match=part.name):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["file", "other files", "beside", "foreign model", "dead link"])
def test_what_is_not_an_export_of_ours_is_never_replaced(tmp_path: Path, kind: str) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "dead link":
        out.symlink_to(tmp_path / "gone")
    else:
        out.mkdir()
        if kind == "other files":
            (out / "thesis.tex").write_text("precious")
        elif kind == "foreign model":
            (out / "config.json").write_text('{"architecture": "resnet18"}')
        else:
            export_run(tmp_path / "run", out)
            (out / "README.md").write_text("precious")
    before = sorted((p, p.read_bytes()) for p in tmp_path.glob("out/*")) if out.is_dir() else out.is_symlink()
    with pytest.raises(ExportError):
        export_run(tmp_path / "run", out)
    after = sorted((p, p.read_bytes()) for p in tmp_path.glob("out/*")) if out.is_dir() else out.is_symlink()
    assert before == after


def test_an_empty_folder_and_an_older_export_are_replaced(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    models = tiny_run(tmp_path / "run", recipe)
    out = tmp_path / "out"
    out.mkdir()
    export_run(tmp_path / "run", out, which="40")
    export_run(tmp_path / "run", out)
    assert torch.equal(logits(load_export(out)[0], recipe), logits(models[80], recipe))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_a_failed_write_leaves_the_older_export_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path / "run", tiny_recipe())
    out = tmp_path / "out"
    export_run(tmp_path / "run", out, which="40")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("livt_scale.export.write_export.write_tensors", full)
    with pytest.raises(ExportError, match="No space left"):
        export_run(tmp_path / "run", out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_an_export_that_timm_reads_otherwise_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    true_config = for_timm.timm_config

    def with_token_pooling(info: ExportInfo) -> dict[str, object]:
        config = true_config(info)
        config["model_args"] |= {"global_pool": "token", "fc_norm": True}
        return config

    monkeypatch.setattr("livt_scale.export.write_export.timm_config", with_token_pooling)
    with pytest.raises(ExportError, match="timm reads other logits"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_changed_weights_and_a_changed_config_are_found(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    out = tmp_path / "out"
    export_run(tmp_path / "run", out)
    weights, config = (out / WEIGHTS).read_bytes(), json.loads((out / CONFIG).read_text())
    for damage in (weights[:-1], weights[:-1] + bytes([weights[-1] ^ 1]), b""):
        (out / WEIGHTS).write_bytes(damage)
        with pytest.raises(ExportError, match=WEIGHTS):
            load_export(out)
    (out / WEIGHTS).write_bytes(weights)
    for part, message in (
        ({"version": 2}, "livt: version"),
        ({"class_names": ["a"]}, "class_names"),
        ({"model": {"size": "vit_micro", "image_px": 28, "channels": 1}}, r"does not fit the model.*missing"),
        ({"unheard_of": 1}, "unheard_of"),
    ):
        (out / CONFIG).write_text(json.dumps(config | {"livt": config["livt"] | part}))
        with pytest.raises(ExportError, match=message):
            load_export(out)
    (out / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ExportError, match="not of an export"):
        load_export(out)


def test_a_pickle_in_place_of_the_weights_is_never_opened(tmp_path: Path) -> None:
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    out, mark = tmp_path / "out", tmp_path / "mark"
    export_run(tmp_path / "run", out)

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (mark,)

    torch.save({"x": Payload(), "y": np.zeros(3)}, out / WEIGHTS)
    config = json.loads((out / CONFIG).read_text())
    config["livt"]["weights"] |= {"bytes": (out / WEIGHTS).stat().st_size, "sha256": sha256_of(out / WEIGHTS)}
    (out / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ExportError, match="cannot be read"):
        load_export(out)
    assert not mark.exists()
