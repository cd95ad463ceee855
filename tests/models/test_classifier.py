import math

import pytest
import timm
import torch

from livt_scale.config.recipe import Decoder, Model
from livt_scale.models.classifier import build_classifier, load_encoder
from livt_scale.models.layers import sincos_positions, vit_args
from livt_scale.models.mae import build_mae
from livt_scale.util.errors import CheckpointMismatch, UsageError

MICRO = Model(size="vit_micro", image_px=28, channels=1, decoder=Decoder(width=32, depth=1, heads=2))


def micro(*, drop_path=0.0, num_classes=10):
    torch.manual_seed(0)
    return build_classifier(MICRO, num_classes=num_classes, drop_path=drop_path)


@pytest.mark.parametrize(
    ("size", "millions"), [("vit_ti", 5.5), ("vit_s", 21.7), ("vit_b", 85.8), ("vit_l", 303.3), ("vit_h", 630.8)]
)
def test_sizes_have_the_published_number_of_weights(size, millions):
    with torch.device("meta"):
        model = build_classifier(Model(size=size), num_classes=1000, drop_path=0.1)
    assert sum(p.numel() for p in model.parameters()) - 1001 * model.embed_dim < millions * 1.01e6
    without_head = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("head."))
    assert without_head / 1e6 == pytest.approx(millions, abs=0.06)


def test_the_state_dict_loads_into_plain_timm_and_gives_the_same_logits():
    model = micro(drop_path=0.3).eval()
    plain = timm.models.vision_transformer.VisionTransformer(**vit_args(MICRO), num_classes=10, global_pool="avg")
    plain.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(model(images), plain.eval()(images), rtol=0, atol=0)


def test_the_head_starts_near_zero_and_positions_start_as_sines_and_are_trained():
    model = micro(num_classes=1000)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not model.head.bias.any()
    assert model.pos_embed.requires_grad
    torch.testing.assert_close(model.pos_embed.detach(), sincos_positions(96, 7))
    assert model.fc_norm.eps == model.blocks[0].norm1.eps == 1e-6


@pytest.mark.parametrize("depth", [1, 4])
def test_a_dropped_branch_adds_nothing_and_a_kept_one_is_scaled(depth):
    torch.manual_seed(0)
    model = build_classifier(MICRO.model_copy(update={"depth": depth}), num_classes=5, drop_path=0.4).train()
    images = torch.randn(6, 1, 28, 28)
    drop = torch.rand(6, 2 * depth)
    tokens = model._pos_embed(model.patch_embed(images))
    for k, block in enumerate(model.blocks):
        keep = 1 - 0.4 * k / max(depth - 1, 1)  # timm's linspace(0, rate, depth)
        for j, branch in enumerate((lambda x, b=block: b.attn(b.norm1(x)), lambda x, b=block: b.mlp(b.norm2(x)))):
            factor = torch.tensor([1 / keep if u < keep else 0.0 for u in drop[:, 2 * k + j]])
            tokens = tokens + factor.view(-1, 1, 1) * branch(tokens)
    expected = model.head(model.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(model(images, drop), expected)


def test_rates_rise_with_depth_as_timms():
    ours = [b.drop_path1.rate for b in build_classifier(MICRO, num_classes=2, drop_path=0.2).blocks]
    theirs = timm.models.vision_transformer.VisionTransformer(**vit_args(MICRO), drop_path_rate=0.2).blocks
    assert ours == pytest.approx([getattr(b.drop_path1, "drop_prob", 0.0) for b in theirs])


def test_the_expected_output_of_a_branch_is_unchanged():
    path = micro(drop_path=0.4).train().blocks[3].drop_path1
    path.draw((torch.arange(1000) + 0.5) / 1000)
    branch = torch.ones(1000, 2, 3)
    torch.testing.assert_close(path(branch).mean(0), torch.ones(2, 3), rtol=1e-3, atol=0)


def test_a_samples_coins_are_its_own_whatever_its_batch():
    model = micro(drop_path=0.5).train()
    images, drop = torch.randn(4, 1, 28, 28), torch.rand(4, 8)
    together = model(images, drop)
    alone = torch.cat([model(images[i : i + 1], drop[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone)


def test_evaluation_drops_nothing_and_needs_no_coins():
    model = micro(drop_path=0.5).eval()
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(images, torch.zeros(2, 8)), model(images), rtol=0, atol=0)
    assert not any("drop_path" in name for name in model.state_dict())


def test_without_coins_they_are_torchs():
    model = micro(drop_path=0.5).train()
    with torch.no_grad():
        model.head.weight.normal_()  # else all logits are nearly 0
    images = torch.randn(2, 1, 28, 28)
    torch.manual_seed(1)
    own = model(images)
    torch.manual_seed(1)
    torch.testing.assert_close(own, model(images, torch.rand(2, 8)), rtol=0, atol=0)
    torch.manual_seed(2)
    assert not torch.equal(own, model(images))
    with pytest.raises(UsageError, match=r"drop is \[2, 4\]"):
        model(images, torch.rand(2, 4))


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (1, 28, 28)])
def test_images_of_another_shape_are_wrong_usage(shape):
    with pytest.raises(UsageError, match=r"the model takes \[B, 1, 28, 28\]"):
        micro(drop_path=0.0)(torch.randn(shape))


def test_torchs_generator_is_not_used_in_training():
    model = micro(drop_path=0.5).train()
    before = torch.get_rng_state()
    model(torch.ones(2, 1, 28, 28), torch.full((2, 8), 0.5))
    assert torch.equal(before, torch.get_rng_state())


def test_activation_checkpointing_sees_the_same_coins_again():
    model = micro(drop_path=0.5).train()
    torch.nn.init.normal_(model.head.weight)
    images, drop = torch.randn(4, 1, 28, 28), torch.rand(4, 8)
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model(images, drop).square().sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_encoder_of_an_autoencoder_moves_over_whole():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.normal_()
    model = micro()
    report = load_encoder(model, mae.state_dict())
    own = model.state_dict()
    assert set(report.used) | set(report.made) == set(own)
    assert set(report.made) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(n.startswith("decoder_") or n in ("mask_token", "norm.weight", "norm.bias") for n in report.left)
    assert set(report.used) | set(report.left) == set(mae.state_dict())
    for name in report.used:
        assert torch.equal(own[name], mae.state_dict()[name]), name
    assert not report.resized


def test_a_second_token_begins_with_the_class_tokens_position_and_its_own_values():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    with torch.no_grad():
        mae.pos_embed.normal_()
        mae.norm.weight.normal_()
    distilled = MICRO.model_copy(update={"distillation_token": True})
    model = build_classifier(distilled, num_classes=10, drop_path=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_encoder(model, mae.state_dict())
    assert set(report.made) == {"dist_token", *(f"{h}.{w}" for h in ("head", "head_dist") for w in ("weight", "bias"))}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.made)
    assert torch.equal(model.pos_embed[:, 0], mae.pos_embed[:, 0])
    assert torch.equal(model.pos_embed[:, 1:], mae.pos_embed)
    assert torch.equal(model.norm.weight, mae.norm.weight)
    assert not torch.equal(model.dist_token, model.cls_token)
    of_mean_pooling = {name: tensor for name, tensor in mae.state_dict().items() if not name.startswith("norm.")}
    assert set(load_encoder(model, of_mean_pooling).made) == {*report.made, "norm.weight", "norm.bias"}


def test_an_encoder_sees_what_the_autoencoder_sees_when_nothing_is_masked():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75).eval()
    model = micro().eval()
    load_encoder(model, mae.state_dict())
    images = torch.randn(2, 1, 28, 28)
    tokens = mae._encode(images, torch.arange(49).expand(2, -1))
    torch.testing.assert_close(mae.norm(model.forward_features(images)), tokens)


def broken(**changes):
    state = build_mae(MICRO, norm_pix=True, mask_ratio=0.75).state_dict()
    for name, tensor in changes.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.mlp.fc1.weight": None}, "blocks.1.mlp.fc1.weight is missing"),
        ({"blocks.4.norm1.weight": torch.ones(96)}, "blocks.4.norm1.weight has no place"),
        ({"cls_token": torch.ones(1, 1, 95)}, r"cls_token is \[1, 1, 95\], the model's \[1, 1, 96\]"),
        ({"pos_embed": torch.ones(1, 48, 96)}, "pos_embed is"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(changes, message):
    model = micro()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointMismatch, match=message):
        load_encoder(model, broken(**changes))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_which_nothing_matches_are_refused():
    state = {f"module.{name}": tensor for name, tensor in broken().items()}
    with pytest.raises(CheckpointMismatch, match="no tensor"):
        load_encoder(micro(), state)


def test_positions_of_another_grid_are_resampled_and_reported():
    small = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    model = build_classifier(MICRO.model_copy(update={"image_px": 56}), num_classes=10, drop_path=0.0)
    report = load_encoder(model, small.state_dict())
    assert report.resized == ("pos_embed",)
    torch.testing.assert_close(model.pos_embed[:, 0].detach(), small.pos_embed[:, 0])
    grids = [p.detach()[0, 1:].unflatten(0, (n, n)) for p, n in ((small.pos_embed, 7), (model.pos_embed, 14))]
    coarse = torch.nn.functional.interpolate(
        grids[0].permute(2, 0, 1)[None], size=(14, 14), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(grids[1], coarse[0].permute(1, 2, 0))
    assert math.isfinite(model(torch.randn(1, 1, 56, 56)).sum().item())
