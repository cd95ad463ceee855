"""A model of timm as stage 2's network: timm's names, layers and logits, a new head, random numbers by sample."""

from __future__ import annotations

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.optim import param_groups_layer_decay

from livt_scale.config.model import Model
from livt_scale.config.tuning import TrainHead
from livt_scale.distributed.blocks import blocks_of, prepare_blocks
from livt_scale.models.classifier import HEAD_STD, build_classifier, head_of
from livt_scale.models.parameter_efficient import build_tuned
from livt_scale.optim import param_groups
from livt_scale.plan.parameters import weights_of
from livt_scale.util.errors import UsageError
from tests.timm_families import FAMILIES, families, family


def built(name, *, drop_path=0.2, **changes):
    torch.manual_seed(0)
    return build_classifier(family(name, **changes), num_classes=5, drop_path=drop_path)


def batch(model, images=4):
    torch.manual_seed(1)
    return torch.randn(images, *model.image_shape), torch.rand(images, model.num_branches)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_decay_as_in_timm(name):
    model = built(name)
    names = {id(parameter): each for each, parameter in model.named_parameters()}
    exempt = getattr(model, "no_weight_decay", set)()
    theirs = param_groups_layer_decay(model, 0.05, exempt, layer_decay=0.7)
    ours = param_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.7)

    def as_set(groups):
        return {
            (frozenset(names[id(p)] for p in g["params"]), round(g["lr_scale"], 9), g["weight_decay"]) for g in groups
        }

    assert as_set(ours) == as_set(theirs)
    assert len({g["lr_scale"] for g in ours}) > 2


@pytest.mark.parametrize("name", families(["swin"]))
def test_names_and_logits_are_timms_and_the_plan_counts_its_parameters(name):
    model = built(name).eval()
    given = family(name)
    plain = timm.create_model(
        given.timm,
        num_classes=5,
        in_chans=1,
        **given.args,
        **({} if name in ("convnext", "efficientnet") else {"img_size": given.image_px}),
    )
    plain.load_state_dict(model.state_dict())
    images, _ = batch(model)
    assert torch.equal(model(images), plain.eval()(images))
    planned = {weight.name: weight.shape for weight in weights_of(given, "finetune", num_classes=5)}
    assert planned == {each: tuple(parameter.shape) for each, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", families(["registers"]))
def test_random_numbers_belong_to_the_samples(name):
    larger = {"timm": "efficientnet_b0"} if name == "efficientnet" else {}  # the small one has no skips to drop
    model = built(name, drop_path=0.6, **larger).train()
    torch.nn.init.normal_(head_of(model).weight)
    for module in model.modules():  # a batch norm sees the other images of its batch
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images, drop = batch(model, 8)
    assert model.num_branches
    once, other = model(images, drop), model(images, torch.rand_like(drop))
    assert torch.equal(once, model(images, drop))
    assert not torch.equal(once, other)
    torch.testing.assert_close(model(images[2:5], drop[2:5]), once[2:5])


def test_the_head_starts_near_zero_and_a_probe_trains_it_alone():
    model = build_classifier(family("convnext"), num_classes=5, drop_path=0.0)
    assert 0 < head_of(model).weight.std() < 2 * HEAD_STD
    probe = build_tuned(family("efficientnet"), num_classes=5, drop_path=0.0, tuning=TrainHead())
    assert [name for name, p in probe.named_parameters() if p.requires_grad] == ["classifier.weight", "classifier.bias"]
    before = {name: tensor.clone() for name, tensor in probe.named_buffers()}
    probe.train()(torch.randn(4, 1, 32, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in probe.named_buffers())


def test_other_random_numbers_follow_from_the_images_of_the_rank():
    model = built("clip", args={**FAMILIES["clip"]["args"], "patch_drop_rate": 0.5})
    torch.nn.init.normal_(head_of(model).weight)
    images, drop = batch(model)
    state = torch.get_rng_state()
    once = model(images, drop)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(once, model(images, drop))
    assert not torch.allclose(once, model(images, drop.flip(1)))


@pytest.mark.parametrize("name", families(["eva02"]))
def test_recomputed_blocks_give_the_same_gradients(name):
    plain, recomputed = built(name), built(name)
    prepare_blocks(recomputed, recompute=True, compiled=False)
    assert len(list(blocks_of(recomputed))) > 1
    images, drop = batch(plain)
    for model in (plain, recomputed):
        model(images, drop).logsumexp(1).sum().backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"timm": "vit_base_patch16_225"}, "did you mean 'vit_base_patch16_224"),
        ({"timm": "convnext_atto.d2_in2k"}, "did you mean"),
        ({"timm": "hf-hub:someone/something"}, "no such model"),
        ({"timm": "vit_tiny_patch16_224", "image_px": 225}, "the nearest are 224 and 240"),
        ({"timm": "vit_tiny_patch16_224", "args": {"depht": 2}}, "depht"),
        ({"timm": "vit_tiny_patch16_224", "args": {"checkpoint_path": "x"}}, "stages.finetune.weights"),
        ({"timm": "deit_tiny_distilled_patch16_224"}, "several classifiers"),
        ({"timm": "convnext_atto", "image_px": 8}, "cannot take such images"),
        ({"timm": "convnext_atto", "width": 3}, "width has no effect"),
        ({"timm": "convnext_atto", "size": "vit_b"}, "timm names another model"),
        ({"size": "timm"}, "set model.timm"),
        ({"args": {"depth": 2}}, "no effect without timm"),
    ],
)
def test_what_cannot_be_is_refused(model, said):
    with pytest.raises(ValidationError, match=said):
        Model.model_validate(model)


def test_images_of_another_size_are_refused():
    with pytest.raises(UsageError):
        built("convnext")(torch.zeros(1, 1, 64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "head", "first", "count"),
    [
        ("caformer_s18", "head.fc.fc2", "stages.0.blocks.0", 18),
        ("cait_xxs24_224", "head", "blocks.0", 24),
        ("sequencer2d_s", "head.fc", "stages.0.blocks.0", 18),
        ("hrnet_w18_small", "classifier", None, 0),
    ],
)
def test_parts_are_found_where_timm_has_no_patterns_or_takes_no_size(name, head, first, count):
    facts = Model.model_validate({"timm": name}).timm_facts
    assert facts.head == head
    assert len(facts.blocks) == count
    assert next(iter(facts.blocks), None) == first
