"""The masked autoencoder against an independent re-computation in NumPy float64, from the paper's formulas.

Loss: by `numpy_loss` below, which knows nothing of the package: it takes a state dict in the official layout, images
and noise. Gradients: central differences of that same NumPy loss, for entries of every parameter and along random
directions through all of them at once.
"""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from livt_scale.config.recipe import Decoder, Model
from livt_scale.models.mae import MaskedAutoencoder, build_mae

WIDTH, HEADS, DEC_WIDTH, DEC_HEADS, PATCH, GRID, BATCH = 12, 3, 8, 2, 4, 3, 2
MASK_RATIO = 0.7  # of 9 patches: int(2.7) are kept


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def attention(x, w, prefix, heads):
    """softmax(Q Kᵀ / √d) V, head by head."""
    width = x.shape[-1]
    d = width // heads
    qkv = x @ w[prefix + "qkv.weight"].T + w[prefix + "qkv.bias"]
    q, k, v = qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :]
    out = np.empty_like(x)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / math.sqrt(d)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., part] = scores / scores.sum(-1, keepdims=True) @ v[..., part]
    return out @ w[prefix + "proj.weight"].T + w[prefix + "proj.bias"]


def transformer(x, w, name, heads):
    """Pre-norm blocks: x + attention(norm(x)), then x + MLP(norm(x)) with the exact GELU."""
    k = 0
    while f"{name}.{k}.norm1.weight" in w:
        p = f"{name}.{k}."
        x = x + attention(layer_norm(x, w[p + "norm1.weight"], w[p + "norm1.bias"]), w, p + "attn.", heads)
        hidden = layer_norm(x, w[p + "norm2.weight"], w[p + "norm2.bias"])
        hidden = hidden @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"]
        hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
        x = x + hidden @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
        k += 1
    return x


def numpy_prediction(w, images, noise, num_kept):
    """Predictions for every patch `[B, L, p·p·C]`, and 1 where it was left out, in the official order of steps."""
    embedded = np.zeros((len(images), GRID * GRID, WIDTH))
    for row in range(GRID):
        for column in range(GRID):
            patch = images[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            projected = np.einsum("bcpq,dcpq->bd", patch, w["patch_embed.proj.weight"])
            embedded[:, row * GRID + column] = projected + w["patch_embed.proj.bias"]
    embedded += w["pos_embed"][:, 1:]

    kept = np.stack([np.argsort(n, kind="stable")[:num_kept] for n in noise])
    tokens = [
        np.concatenate([w["cls_token"][0] + w["pos_embed"][0, :1], x[i]]) for x, i in zip(embedded, kept, strict=True)
    ]
    latent = transformer(np.stack(tokens), w, "blocks", HEADS)
    latent = layer_norm(latent, w["norm.weight"], w["norm.bias"])

    seen = latent @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    full = np.broadcast_to(w["mask_token"], (len(images), 1 + GRID * GRID, DEC_WIDTH)).copy()
    is_masked = np.ones((len(images), GRID * GRID))
    for b, places in enumerate(kept):
        full[b, 0] = seen[b, 0]
        full[b, 1 + places] = seen[b, 1:]
        is_masked[b, places] = 0
    full = transformer(full + w["decoder_pos_embed"], w, "decoder_blocks", DEC_HEADS)
    full = layer_norm(full, w["decoder_norm.weight"], w["decoder_norm.bias"])
    return full[:, 1:] @ w["decoder_pred.weight"].T + w["decoder_pred.bias"], is_masked


def patch_values(images):
    """`[B, L, p·p·C]`: pixel by pixel, the channels of one pixel together."""
    values = np.empty((len(images), GRID * GRID, PATCH * PATCH * images.shape[1]))
    for row in range(GRID):
        for column in range(GRID):
            patch = images[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
            values[:, row * GRID + column] = patch.transpose(0, 2, 3, 1).reshape(len(images), -1)
    return values


def numpy_loss(w, images, noise, num_kept, *, norm_pix):
    prediction, is_masked = numpy_prediction(w, images, noise, num_kept)
    target = patch_values(images)
    if norm_pix:
        target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    a_patch = ((prediction - target) ** 2).mean(-1)
    return (a_patch * is_masked).sum() / is_masked.sum()


def example(*, channels, norm_pix, dtype=torch.float64):
    """A small autoencoder whose every weight matters (no zero bias, no norm of 1), images, noise."""
    torch.manual_seed(channels)
    model = Model(
        size="vit_micro",
        width=WIDTH,
        depth=2,
        heads=HEADS,
        patch_px=PATCH,
        image_px=GRID * PATCH,
        channels=channels,
        decoder=Decoder(width=DEC_WIDTH, depth=2, heads=DEC_HEADS),
    )
    mae = build_mae(model, norm_pix=norm_pix, mask_ratio=MASK_RATIO).double()
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(BATCH, channels, GRID * PATCH, GRID * PATCH, dtype=torch.float64)
    noise = torch.rand(BATCH, GRID * GRID)
    return mae.to(dtype), images.to(dtype), noise


def as_numpy(mae: MaskedAutoencoder) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy().copy() for name, tensor in mae.state_dict().items()}


settings = pytest.mark.parametrize(("channels", "norm_pix"), [(1, True), (1, False), (3, True), (3, False)])


@settings
def test_loss_equals_the_independent_computation(channels, norm_pix):
    mae, images, noise = example(channels=channels, norm_pix=norm_pix)
    expected = numpy_loss(as_numpy(mae), images.numpy(), noise.numpy(), 2, norm_pix=norm_pix)
    assert mae(images, noise).item() == pytest.approx(expected, rel=1e-12)

    mae, images, noise = example(channels=channels, norm_pix=norm_pix, dtype=torch.float32)
    expected = numpy_loss(as_numpy(mae), images.double().numpy(), noise.numpy(), 2, norm_pix=norm_pix)
    assert mae(images, noise).item() == pytest.approx(expected, rel=1e-5)


@settings
def test_gradients_equal_central_differences_of_the_independent_loss(channels, norm_pix):
    mae, images, noise = example(channels=channels, norm_pix=norm_pix)
    mae(images, noise).backward()
    weights = as_numpy(mae)
    random = np.random.default_rng(0)

    def slope(name, direction, h=1e-5):
        ends = []
        for sign in (1, -1):
            moved = {**weights, name: weights[name] + sign * h * direction}
            ends.append(numpy_loss(moved, images.numpy(), noise.numpy(), 2, norm_pix=norm_pix))
        return (ends[0] - ends[1]) / (2 * h)

    trained = {name: p.grad.numpy() for name, p in mae.named_parameters() if p.requires_grad}
    assert set(weights) - set(trained) == {"pos_embed", "decoder_pos_embed"}
    for name, gradient in trained.items():
        everywhere = random.standard_normal(gradient.shape)
        one = np.zeros(gradient.size)
        one[random.integers(gradient.size)] = 1
        for direction in (everywhere, one.reshape(gradient.shape)):
            expected = slope(name, direction)
            assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@settings
def test_single_precision_gradients_equal_the_double_ones(channels, norm_pix):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        mae, images, noise = example(channels=channels, norm_pix=norm_pix, dtype=dtype)
        mae(images, noise).backward()
        gradients.append([p.grad.double() for p in mae.parameters() if p.requires_grad])
    for single, double in zip(*gradients, strict=True):
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-5)


@settings
def test_reconstruction_undoes_the_pixel_normalisation_and_keeps_visible_patches(channels, norm_pix):
    mae, images, noise = example(channels=channels, norm_pix=norm_pix)
    pixels, is_masked = mae.reconstruct(images, noise)
    prediction, expected_mask = numpy_prediction(as_numpy(mae), images.numpy(), noise.numpy(), 2)
    np.testing.assert_array_equal(is_masked.numpy(), expected_mask.astype(bool))

    truth = patch_values(images.numpy())
    if norm_pix:
        deviation = np.sqrt(truth.var(-1, ddof=1, keepdims=True) + 1e-6)
        prediction = prediction * deviation + truth.mean(-1, keepdims=True)
    expected = np.where(expected_mask[..., None] == 1, prediction, truth)
    assert pixels.shape == images.shape
    np.testing.assert_allclose(patch_values(pixels.numpy()), expected, rtol=1e-10, atol=1e-10)
    visible = patch_values(pixels.numpy())[expected_mask == 0]
    np.testing.assert_array_equal(visible, truth[expected_mask == 0])  # bit for bit
