"""MAE once more, from the paper's formulas alone: weights in the official layout, and what they give. In float64.

Independent of the package: no timm, no nn.Module; matrices, loops over images, and the unshuffling of the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, PATCH, GRID, CHANNELS = 32, 2, 4, 4, 4, 3
DEC_WIDTH, DEC_DEPTH, DEC_HEADS = 16, 1, 2
KEEP = 4


def official_state(*, seed: int = 0, patch: int = PATCH, channels: int = CHANNELS) -> dict[str, Tensor]:
    """Random weights under the names of facebookresearch/mae's models_mae.py."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.2

    state = {
        "cls_token": normal(1, 1, WIDTH),
        "pos_embed": normal(1, 1 + GRID**2, WIDTH),
        "mask_token": normal(1, 1, DEC_WIDTH),
        "decoder_pos_embed": normal(1, 1 + GRID**2, DEC_WIDTH),
        "patch_embed.proj.weight": normal(WIDTH, channels, patch, patch),
        "patch_embed.proj.bias": normal(WIDTH),
    }
    for stack, depth, width in (("blocks", DEPTH, WIDTH), ("decoder_blocks", DEC_DEPTH, DEC_WIDTH)):
        for k in range(depth):
            linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            for name, (out, given) in linear.items():
                state[f"{stack}.{k}.{name}.weight"] = normal(out * width, given * width)
                state[f"{stack}.{k}.{name}.bias"] = normal(out * width)
            for name in ("norm1", "norm2"):
                state |= {f"{stack}.{k}.{name}.weight": 1 + normal(width), f"{stack}.{k}.{name}.bias": normal(width)}
    state |= {"norm.weight": 1 + normal(WIDTH), "norm.bias": normal(WIDTH)}
    state |= {"decoder_embed.weight": normal(DEC_WIDTH, WIDTH), "decoder_embed.bias": normal(DEC_WIDTH)}
    state |= {"decoder_norm.weight": 1 + normal(DEC_WIDTH), "decoder_norm.bias": normal(DEC_WIDTH)}
    values = patch**2 * channels
    state |= {"decoder_pred.weight": normal(values, DEC_WIDTH), "decoder_pred.bias": normal(values)}
    return state


def loss_and_patches(state: dict[str, Tensor], images: Tensor, noise: Tensor) -> tuple[float, Tensor]:
    """(loss over masked patches of normalised pixels, predicted patches `[B, L, p·p·C]`)."""
    w = {name: tensor.double() for name, tensor in state.items()}
    losses, predictions = [], []
    for image, chance in zip(images.double(), noise, strict=True):
        patches = torch.stack([  # a patch's values: row, column, channel
            image[:, r * PATCH : (r + 1) * PATCH, c * PATCH : (c + 1) * PATCH].permute(1, 2, 0).reshape(-1)
            for r in range(GRID) for c in range(GRID)
        ])  # fmt: skip
        kernel = w["patch_embed.proj.weight"].permute(0, 2, 3, 1).reshape(WIDTH, -1)
        tokens = patches @ kernel.T + w["patch_embed.proj.bias"] + w["pos_embed"][0, 1:]
        kept = sorted(range(GRID**2), key=lambda k: float(chance[k]))[:KEEP]
        x = torch.cat([w["cls_token"][0] + w["pos_embed"][0, :1], tokens[kept]])
        for k in range(DEPTH):
            x = _block(x, w, f"blocks.{k}.", HEADS)
        x = _linear(_norm(x, w, "norm"), w, "decoder_embed")
        full = w["mask_token"][0].repeat(1 + GRID**2, 1)
        full[[0] + [k + 1 for k in kept]] = x
        full = full + w["decoder_pos_embed"][0]
        for k in range(DEC_DEPTH):
            full = _block(full, w, f"decoder_blocks.{k}.", DEC_HEADS)
        predicted = _linear(_norm(full, w, "decoder_norm"), w, "decoder_pred")[1:]
        mean, variance = patches.mean(1, keepdim=True), patches.var(1, keepdim=True)
        target = (patches - mean) / (variance + 1e-6).sqrt()
        masked = [k for k in range(GRID**2) if k not in kept]
        losses.append(((predicted - target) ** 2).mean(1)[masked].mean())
        predictions.append(predicted)
    return float(torch.stack(losses).mean()), torch.stack(predictions)


def _linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _block(x: Tensor, w: dict[str, Tensor], at: str, heads: int) -> Tensor:
    query, key, value = _linear(_norm(x, w, f"{at}norm1"), w, f"{at}attn.qkv").chunk(3, dim=1)
    dim = query.shape[1] // heads
    mixed = []
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        mixed.append(torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(dim), dim=1) @ value[:, part])
    x = x + _linear(torch.cat(mixed, dim=1), w, f"{at}attn.proj")
    hidden = _linear(_norm(x, w, f"{at}norm2"), w, f"{at}mlp.fc1")
    gelu = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + _linear(gelu, w, f"{at}mlp.fc2")
