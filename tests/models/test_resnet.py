import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn

from livt_scale.config.recipe import Model, Parallel, Recipe, digest, learnt_from
from livt_scale.distributed.ddp import with_fast_convolutions
from livt_scale.models.classifier import build_classifier, head_name
from livt_scale.models.resnet import BatchNorm2d, residual_blocks
from livt_scale.util.errors import UsageError

SMALL = Model(size="resnet18", image_px=28, channels=1)


def small(drop_path=0.0, num_classes=10):
    torch.manual_seed(0)
    return build_classifier(SMALL, num_classes=num_classes, drop_path=drop_path)


def recipe(*, model=None, finetune=None, **parts):
    stages = {"finetune": {"init": "scratch", "layer_decay": 1.0} | (finetune or {})}
    fields = {"name": "r", "data": {"train": "t"}, "model": {"size": "resnet18"} | (model or {}), "stages": stages}
    return Recipe.model_validate(fields | parts)


@pytest.mark.parametrize(("size", "millions"), [("resnet18", 11.69), ("resnet34", 21.80), ("resnet50", 25.56)])
def test_sizes_have_the_published_number_of_weights(size, millions):
    with torch.device("meta"):
        model = build_classifier(Model(size=size), num_classes=1000, drop_path=0.1)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("size", ["resnet18", "resnet50"])
def test_at_224_px_it_is_plain_timm_to_the_bit(size):
    model = build_classifier(Model(size=size, image_px=96), num_classes=7, drop_path=0.2)
    images = torch.randn(2, 3, 96, 96)
    model.train()(images, torch.rand(2, Model(size=size).num_branches))  # statistics that are not the initial ones
    plain = timm.create_model(size, num_classes=7)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model.eval()(images), plain.eval()(images))


def test_without_stochastic_depth_training_is_plain_timms_to_the_bit():
    model = build_classifier(Model(size="resnet18", image_px=96), num_classes=7, drop_path=0.0)
    plain = timm.create_model("resnet18", num_classes=7)
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 96, 96)
    for network in (model.train(), plain.train()):
        network(images).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(model.state_dict()[n], tensor) for n, tensor in plain.state_dict().items())


def test_small_images_keep_their_grid_to_the_first_stage():
    model = small().eval()
    assert model.conv1.weight.shape == (64, 1, 3, 3)
    assert model.forward_features(torch.randn(2, 1, 28, 28)).shape == (2, 512, 4, 4)
    assert not Model(size="resnet18", image_px=65).has_small_stem


@pytest.mark.parametrize("size", ["resnet18", "resnet50"])
def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_scaled(size):
    model = build_classifier(Model(size=size, image_px=32), num_classes=5, drop_path=0.5).train()
    blocks = residual_blocks(model)
    assert len(blocks) == Model(size=size).num_branches
    assert [round(b.drop_path.rate * (len(blocks) - 1) / 0.5) for b in blocks] == list(range(len(blocks)))
    last, seen = blocks[-1], []
    last.drop_path.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].clone(), out.clone())))
    for name in ("bn2", "bn3"):
        if hasattr(last, name):  # the last norm of a branch begins at 0
            torch.nn.init.ones_(getattr(last, name).weight)
    drop = torch.full((4, len(blocks)), 0.1)
    drop[1, -1] = drop[3, -1] = 0.9
    model(torch.randn(4, 3, 32, 32), drop)
    ((branch, out),) = seen
    assert not out[[1, 3]].any()
    assert branch.any()
    torch.testing.assert_close(out[[0, 2]], 2 * branch[[0, 2]])


def test_without_coins_they_are_torchs():
    model, images = small(drop_path=0.5).train(), torch.randn(2, 1, 28, 28)
    assert model(images).shape == (2, 10)
    with pytest.raises(UsageError, match="drop is"):
        model(images, torch.rand(2, 1))
    with pytest.raises(UsageError, match=r"the model takes \[B, 1, any, any\]"):
        model(torch.randn(2, 3, 28, 28))


def test_batch_norm_with_weights_in_16_bits_is_that_of_fp32():
    model, plain = small().train(), small().train()
    images = torch.randn(4, 1, 28, 28)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # ones and zeros: no rounding
            module.weight.data, module.bias.data = module.weight.data.bfloat16(), module.bias.data.bfloat16()
    assert torch.equal(model(images), plain(images))
    assert model.bn1.running_mean.dtype == torch.float32


def test_the_head_goes_by_timms_name():
    assert head_name(small()) == "fc"
    assert head_name(build_classifier(Model(size="vit_micro", image_px=28), num_classes=2, drop_path=0)) == "head"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"stages": {"pretrain": {}, "finetune": {}}}, "masks patches of our own ViTs, and the model is resnet18"),
        ({"finetune": {"init": "weights", "weights": "w"}}, "begins from scratch alone"),
        ({"finetune": {"layer_decay": 0.75}}, "set layer_decay: 1.0"),
        ({"finetune": {"micro_batch": 1, "mixup": 0, "cutmix": 0}}, "at least 2 images"),
        ({"finetune": {"ema": {"decay": 0.9}}}, "ema averages weights"),
        ({"parallel": {"activation_checkpointing": True}}, "count each batch twice"),
        ({"model": {"width": 64, "depth": 3}}, "width and depth has no effect on size 'resnet18'"),
    ],
)
def test_what_a_resnet_cannot_have_is_refused(parts, said):
    recipe()  # as it stands it is sound
    with pytest.raises(ValidationError, match=said):
        recipe(**parts)


def test_the_micro_size_has_about_the_weights_of_the_micro_vit_and_is_for_small_images():
    counts = {}
    for size, patch_px in (("resnet_micro", None), ("vit_micro", 7)):
        model = Model(size=size, image_px=28, channels=1, patch_px=patch_px)
        counts[size] = sum(p.numel() for p in build_classifier(model, num_classes=10, drop_path=0.0).parameters())
    assert counts["resnet_micro"] == pytest.approx(counts["vit_micro"], rel=0.06)
    with pytest.raises(ValidationError, match="resnet_micro is for images up to 64 px: take resnet18"):
        Model(size="resnet_micro", image_px=65)


def test_the_micro_size_begins_as_the_others_do():
    torch.manual_seed(0)
    model = build_classifier(Model(size="resnet_micro", image_px=28), num_classes=3, drop_path=0.1)
    for block in residual_blocks(model):
        assert isinstance(block.bn2, BatchNorm2d)
        assert not block.bn2.weight.any(), "each residual branch begins at 0"
    first = model.layer1[0]
    assert first.downsample is None
    assert first.conv1.weight.std().item() == pytest.approx((2 / (9 * 20)) ** 0.5, rel=0.1)  # Kaiming, fan out


def test_what_wants_patches_is_told_that_there_are_none():
    with pytest.raises(UsageError, match="resnet18, which has no patches"):
        _ = SMALL.dims


def test_the_micro_batch_decides_what_is_learnt_as_batch_norm_sees_one():
    fields = [learnt_from(recipe(finetune={"micro_batch": n}), "finetune") for n in (32, 64)]
    assert digest(fields[0]) != digest(fields[1])
    of_vits = [learnt_from(recipe(model={"size": "vit_s"}, finetune={"micro_batch": n}), "finetune") for n in (32, 64)]
    assert of_vits[0] == of_vits[1]


def test_channels_last_changes_the_results_by_rounding_and_kernels_are_tried_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    model = build_classifier(Model(size="resnet_micro", image_px=28, channels=1), num_classes=3, drop_path=0.0).eval()
    images = torch.randn(4, 1, 28, 28)
    before, parallel = model(images), Parallel()
    assert with_fast_convolutions(model, torch.device("cpu"), parallel) is model
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not torch.backends.cudnn.benchmark
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)
    with_fast_convolutions(model, torch.device("cuda"), parallel)  # as after the move there
    assert torch.backends.cudnn.benchmark
    with_fast_convolutions(model, torch.device("cuda"), Parallel(deterministic=True))
    assert not torch.backends.cudnn.benchmark


def test_a_vit_keeps_its_layout(monkeypatch):
    vit = build_classifier(Model(size="vit_micro", image_px=28, channels=3), num_classes=3, drop_path=0.0)
    with_fast_convolutions(vit, torch.device("cuda"), Parallel())
    assert vit.patch_embed.proj.weight.is_contiguous()
