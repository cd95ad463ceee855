import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.recipe import MODEL_SIZES, Decoder, Model
from livt_scale.models.layers import sincos_positions
from livt_scale.models.mae import build_mae
from livt_scale.util.errors import UsageError

MICRO = Model(size="vit_micro", image_px=28, channels=1, decoder=Decoder(width=32, depth=1, heads=2))


def official_layout(width, depth, patch_px, image_px, *, decoder_width=512, decoder_depth=8, channels=3):
    """Names and shapes of the state dict that the official code saves (`model` of its checkpoints)."""
    tokens = (image_px // patch_px) ** 2 + 1
    layout = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "mask_token": (1, 1, decoder_width),
        "decoder_pos_embed": (1, tokens, decoder_width),
        "patch_embed.proj.weight": (width, channels, patch_px, patch_px),
        "patch_embed.proj.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        "decoder_pred.weight": (patch_px**2 * channels, decoder_width),
        "decoder_pred.bias": (patch_px**2 * channels,),
    }
    for norm, dim in (("norm", width), ("decoder_norm", decoder_width)):
        layout |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
    for stack, dim, blocks in (("blocks", width, depth), ("decoder_blocks", decoder_width, decoder_depth)):
        for k in range(blocks):
            for name, shape in {
                "norm1.weight": (dim,),
                "norm1.bias": (dim,),
                "attn.qkv.weight": (3 * dim, dim),
                "attn.qkv.bias": (3 * dim,),
                "attn.proj.weight": (dim, dim),
                "attn.proj.bias": (dim,),
                "norm2.weight": (dim,),
                "norm2.bias": (dim,),
                "mlp.fc1.weight": (4 * dim, dim),
                "mlp.fc1.bias": (4 * dim,),
                "mlp.fc2.weight": (dim, 4 * dim),
                "mlp.fc2.bias": (dim,),
            }.items():
                layout[f"{stack}.{k}.{name}"] = shape
    return layout


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_a_state_dict_in_the_official_layout_loads_with_every_key_used(size):
    width, depth, _, patch_px = MODEL_SIZES[size]
    layout = official_layout(width, depth, patch_px, 224)
    with torch.device("meta"):  # shapes alone: a ViT-H would be 2.6 GB
        mae = build_mae(Model(size=size), norm_pix=True, mask_ratio=0.75)
        state = {name: torch.empty(shape) for name, shape in layout.items()}
    assert {name: tuple(t.shape) for name, t in mae.state_dict().items()} == layout
    outcome = mae.load_state_dict(state, strict=True, assign=True)
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys


def test_values_of_an_official_state_dict_arrive_in_the_forward_pass():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    layout = official_layout(96, 4, 4, 28, decoder_width=32, decoder_depth=1, channels=1)
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in layout.items()}
    mae.load_state_dict(state, strict=True)
    images, noise = torch.randn(2, 1, 28, 28, generator=generator), torch.rand(2, 49, generator=generator)
    loss = mae(images, noise).item()
    for name, shape in layout.items():  # each key decides something
        mae.load_state_dict({**state, name: state[name] + 0.3 * torch.randn(shape, generator=generator)})
        assert mae(images, noise).item() != loss, name


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_every_size_builds_at_its_published_dims(size):
    width, depth, heads, patch_px = MODEL_SIZES[size]
    with torch.device("meta"):
        mae = build_mae(Model(size=size, image_px=16 * patch_px, channels=4), norm_pix=False, mask_ratio=0.5)
    assert len(mae.blocks) == depth
    assert mae.blocks[0].attn.num_heads == heads
    assert mae.patch_embed.proj.weight.shape == (width, 4, patch_px, patch_px)
    assert mae.decoder_pred.out_features == 4 * patch_px**2


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    mae = build_mae(Model(size="vit_s", image_px=64), norm_pix=True, mask_ratio=0.75)
    for name, part in mae.named_modules():
        if isinstance(part, torch.nn.Linear):
            bound = math.sqrt(6 / (part.in_features + part.out_features))  # Xavier uniform
            assert 0.95 * bound < part.weight.abs().max() <= bound, name
            assert part.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            assert not part.bias.any(), name
        elif isinstance(part, torch.nn.LayerNorm):
            assert part.eps == 1e-6
            assert (part.weight == 1).all()
            assert not part.bias.any()
    patches = mae.patch_embed.proj.weight.detach()
    bound = math.sqrt(6 / (3 * 16 * 16 + 384))  # as a flat linear layer
    assert patches.abs().max() <= bound
    assert patches.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    for token in (mae.cls_token, mae.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(("width", "grid"), [(8, 3), (96, 7), (512, 14)])
def test_positions_are_sines_and_cosines_of_column_and_row(width, grid):
    table = sincos_positions(width, grid).double().numpy()[0]
    assert table.shape == (1 + grid * grid, width)
    assert not table[0].any()  # the class token is nowhere
    quarter = width // 4
    for row, column in ((0, 0), (grid - 1, 1), (2, grid - 1)):
        for i in (0, quarter - 1):
            omega = 1 / 10000 ** (i / quarter)
            expected = [f(x * omega) for x in (column, row) for f in (math.sin, math.cos)]
            found = table[1 + row * grid + column, [i, quarter + i, 2 * quarter + i, 3 * quarter + i]]
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positions_are_in_the_state_dict_and_never_learn():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    mae(torch.randn(2, 1, 28, 28), torch.rand(2, 49)).backward()
    for name in ("pos_embed", "decoder_pos_embed"):
        assert name in mae.state_dict()
        assert not getattr(mae, name).requires_grad
    assert all(p.grad is not None for p in mae.parameters() if p.requires_grad)


@settings(max_examples=30, deadline=None)
@given(num_equal=st.integers(1, 49), ratio=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_masking_keeps_the_lowest_noise_and_equal_noise_by_number(num_equal, ratio, seed):
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=ratio)
    noise = np.random.default_rng(seed).random((3, 49), dtype=np.float32)
    noise[:, :num_equal] = 0.5
    kept, masked = mae.mask(torch.from_numpy(noise))
    for row, keep, mask in zip(noise, kept.tolist(), masked.tolist(), strict=True):
        order = sorted(range(49), key=lambda patch: (row[patch], patch))
        num_kept = int(49 * (1 - ratio))
        assert keep == order[:num_kept]
        assert mask == order[num_kept:]


def test_masked_pixels_never_reach_the_prediction():
    mae = build_mae(MICRO, norm_pix=False, mask_ratio=0.75).eval()
    images, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 49)
    pixels, is_masked = mae.reconstruct(images, noise)
    hidden = is_masked.view(2, 1, 7, 7).repeat_interleave(4, 2).repeat_interleave(4, 3)
    again, _ = mae.reconstruct(torch.where(hidden, 100.0, images), noise)
    torch.testing.assert_close(again[hidden], pixels[hidden], rtol=0, atol=0)


def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    images, noise = torch.randn(4, 1, 28, 28), torch.rand(4, 49)
    alone = [mae(images[i : i + 1], noise[i : i + 1]).item() for i in range(4)]
    assert mae(images, noise).item() == pytest.approx(np.mean(alone), rel=1e-5)


def test_a_flat_patch_gives_a_finite_loss():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    loss = mae(torch.full((2, 1, 28, 28), 0.25), torch.rand(2, 49))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in mae.parameters() if p.requires_grad)


def test_in_bf16_the_loss_is_still_reckoned_in_float32():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    images, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 49)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mae(images, noise)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mae(images, noise).item(), rel=2e-2)


@pytest.mark.parametrize("ratio", [0.001, 0.999])
def test_a_ratio_that_leaves_nothing_to_see_or_to_predict_is_refused(ratio):
    model = MICRO if ratio > 0.5 else Model(size="vit_micro", image_px=4, channels=1)
    with pytest.raises(UsageError, match="mask_ratio"):
        build_mae(model, norm_pix=True, mask_ratio=ratio)


def test_a_patch_of_one_value_cannot_be_normalised():
    model = Model(size="vit_micro", patch_px=1, image_px=4, channels=1)
    with pytest.raises(UsageError, match="variance"):
        build_mae(model, norm_pix=True, mask_ratio=0.75)
    build_mae(model, norm_pix=False, mask_ratio=0.75)


def test_images_of_another_size_are_our_own_mistake():
    mae = build_mae(MICRO, norm_pix=True, mask_ratio=0.75)
    with pytest.raises(AssertionError, match="for 28 px"):
        mae(torch.randn(2, 1, 32, 32), torch.rand(2, 49))
