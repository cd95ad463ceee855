"""Weights into a model of timm: as timm itself loads them, at other sizes too; those of another model are refused."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from livt_scale.config.load import load_recipe
from livt_scale.config.model import Model
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.train.preflight import check_run
from livt_scale.util.errors import RecipeError, WeightsError
from livt_scale.weights.timm_weights import start_from_file, start_from_hub, start_timm
from tests.timm_families import FAMILIES, families, family

LARGER = {"vit": 48, "registers": 42, "dinov2": 42, "eva02": 42, "clip": 48, "siglip": 48, "swin": 64}
PRETRAINED = 7  # classes of the weights


def weights(name, folder, *, suffix="safetensors", **changes):
    torch.manual_seed(3)
    state = build_classifier(family(name, **changes), num_classes=PRETRAINED, drop_path=0.0).state_dict()
    state = {
        each: tensor + torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        for each, tensor in state.items()
    }
    path = folder / f"{name}.{suffix}"
    if suffix == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("name", families(["registers"]))
def test_weights_are_loaded_as_timm_loads_them(name, tmp_path):
    path = weights(name, tmp_path, suffix="pth" if name in ("vit", "efficientnet") else "safetensors")
    px = LARGER.get(name, FAMILIES[name]["image_px"])
    ours = build_classifier(family(name, image_px=px), num_classes=5, drop_path=0.1)
    head = ours.facts.head
    lineage = start_from_file(ours, path, keep_head=False)
    assert lineage["checkpoint"] == path.name
    own = {"file": str(path), "input_size": (1, px, px), "num_classes": PRETRAINED, "custom_load": False}
    size = {"img_size": px} if "img_size" in ours.facts.takes else {}
    theirs = timm.create_model(
        FAMILIES[name]["timm"], pretrained=True, pretrained_cfg_overlay=own, num_classes=5, in_chans=1,
        **FAMILIES[name].get("args", {}), **size,
    )  # fmt: skip
    found, wanted = ours.state_dict(), theirs.state_dict()
    same = [each for each in wanted if not each.startswith(f"{head}.")]
    assert len(same) >= len(wanted) - 2
    for each in same:
        torch.testing.assert_close(found[each], wanted[each], msg=each)


def test_a_head_is_kept_where_the_classes_are_the_same(tmp_path):
    path = weights("convnext", tmp_path)
    model = build_classifier(family("convnext"), num_classes=PRETRAINED, drop_path=0.0)
    start_from_file(model, path, keep_head=True)
    state = timm.models.load_state_dict(str(path))
    assert torch.equal(model.state_dict()["head.fc.weight"], state["head.fc.weight"])
    other = build_classifier(family("convnext"), num_classes=5, drop_path=0.0)
    with pytest.raises(WeightsError, match="keep_head: false"):
        start_from_file(other, path, keep_head=True)


def test_colour_weights_start_a_grey_model(tmp_path):
    path = weights("convnext", tmp_path, channels=3)
    model = build_classifier(family("convnext"), num_classes=5, drop_path=0.0)
    start_from_file(model, path, keep_head=False)
    given = timm.models.load_state_dict(str(path))["stem.0.weight"]
    torch.testing.assert_close(model.state_dict()["stem.0.weight"], given.sum(1, keepdim=True))


def test_weights_of_another_model_are_counted_and_named(tmp_path):
    path = weights("dinov2", tmp_path)
    model = build_classifier(family("registers"), num_classes=5, drop_path=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"is of another model: \d+ of \d+ tensors match; the first .* reg_token"):
        start_from_file(model, path, keep_head=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsError, match=r"not of this model|another model"):
        start_from_file(build_classifier(family("swin"), num_classes=5, drop_path=0.0), path, keep_head=False)


def test_another_number_of_heads_is_known_from_the_file_beside(tmp_path):
    path = weights("vit", tmp_path).rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with pytest.raises(WeightsError, match="4 heads, the model 2"):
        start_from_file(build_classifier(family("vit"), num_classes=5, drop_path=0.0), path, keep_head=False)


def test_an_encoder_pretrained_here_starts_a_vit_of_timm():
    ours = Model(size="vit_ti", width=64, depth=2, heads=2, image_px=32, channels=1)
    mae = build_mae(ours, norm_pix=True, mask_ratio=0.75)
    args = {**FAMILIES["vit"]["args"], "global_pool": "avg"}
    model = build_classifier(family("vit", args=args), num_classes=5, drop_path=0.0)
    taken = start_timm(model, mae.state_dict(), keep_head=False, where="a run")
    assert set(taken.made) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert torch.equal(model.blocks[1].mlp.fc2.weight, mae.blocks[1].mlp.fc2.weight)


def write_recipe(folder, model, finetune=""):
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: x\ndata: {{train: {folder}}}\nmodel: {model}\n"
        f"stages: {{finetune: {{init: weights, weights: download, layer_decay: 0.7{finetune}}}}}\n"
    )
    return path


def test_pixels_and_image_size_are_those_of_the_weights(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, "{timm: test_vit.r160_in1k}"))
    cfg = timm.get_pretrained_cfg("test_vit.r160_in1k")
    assert recipe.data.mean == cfg.mean
    assert recipe.data.std == cfg.std
    assert (recipe.data.crop_pct, recipe.data.interpolation) == (cfg.crop_pct, cfg.interpolation)
    assert recipe.model.image_px == cfg.input_size[-1]
    own = load_recipe(tmp_path / "recipe.yaml", sets=["data.mean=[0.1, 0.2, 0.3]", "model.image_px=96"])
    assert (own.data.mean, own.data.std, own.model.image_px) == ((0.1, 0.2, 0.3), cfg.std, 96)


def test_nothing_is_downloaded_unless_it_is_allowed(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, "{timm: test_vit.r160_in1k}"))
    asked = []
    monkeypatch.setattr(timm.models, "load_state_dict_from_hf", lambda *given, **_: asked.append(given) or {})
    monkeypatch.delenv("LIVT_ALLOW_DOWNLOAD", raising=False)
    assert "stages.finetune.weights" in [problem.field for problem in check_run(recipe)]
    monkeypatch.setenv("LIVT_ALLOW_DOWNLOAD", "1")
    assert "stages.finetune.weights" not in [problem.field for problem in check_run(recipe)]
    assert not asked
    model = build_classifier(recipe.model, num_classes=5, drop_path=0.0)
    with pytest.raises(WeightsError, match="of another model"):
        start_from_hub(model, recipe.model.timm_spec, keep_head=False)
    assert asked == [("timm/test_vit.r160_in1k",)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "finetune", "said"),
    [
        ("{size: vit_micro, image_px: 28}", "", "is for model.timm"),
        ("{timm: test_efficientnet}", ", micro_batch: 1, mixup: 0, cutmix: 0", "batch norm needs at least 2"),
        ("{timm: test_efficientnet}", ", ema: {decay: 0.9}", "batch norm keeps the statistics"),
        (
            "{timm: test_vit}",
            ", train: head, layer_decay: 1, drop_path: 0, head_norm: batch",
            "head_norm is for our own",
        ),
        ("{timm: test_resnet, image_px: 64}", "", ""),
        ("{timm: tset_vit}", "", "did you mean 'test_vit"),
    ],
)
def test_recipes_that_cannot_be(tmp_path, model, finetune, said):
    path = write_recipe(tmp_path, model, finetune.replace(", layer_decay: 1", ""))
    if not said:
        assert load_recipe(path).model.timm_facts.blocks
        return
    with pytest.raises(RecipeError, match=said):
        load_recipe(path, sets=["stages.finetune.layer_decay=1"])
