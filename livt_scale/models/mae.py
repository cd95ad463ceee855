"""Stage 1's network: the masked autoencoder (MAE) over timm's ViT blocks. Images and noise in, one loss out.

Of the L patches of an image, the `len_keep` with the lowest noise are kept and encoded; a small decoder then predicts
the pixels of the others. With L = 4, noise (.9, .1, .5, .7) and a mask ratio of 0.75, patch 1 is kept and patches
2, 3, 0 are predicted. Parameters carry the names and shapes of the official code, so its files load strictly.

The numbers are the official ones; the work is less. Kept patches are picked before they are projected (a quarter of the
patch embedding), the decoder takes its tokens unsorted (kept first, then masked: attention does not depend on the
order, and positions are added to the tokens), and the last block's outputs, norm, prediction and target are computed
only for masked patches.

Source: arXiv 2111.06377, sections 3 and A.1; layout and initialisation of facebookresearch/mae.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from livt_scale.config.model import check_masking
from livt_scale.config.recipe import Decoder, Model
from livt_scale.models.layers import LAYER_NORM, MLP_RATIO, sincos_positions
from livt_scale.util.errors import UsageError

VARIANCE_EPS = 1e-6  # of the pixel normalisation


class Masking(NamedTuple):
    """Patch numbers of each image, in the order of rising noise."""

    kept: Tensor  # int64 [B, K]
    masked: Tensor  # int64 [B, L - K]


def build_mae(model: Model, *, norm_pix: bool, mask_ratio: float) -> MaskedAutoencoder:
    """The masked autoencoder of a recipe's `model`, freshly initialised from torch's global generator.

    Raises UsageError where `mask_ratio` leaves no patch to see or none to predict.
    """
    try:
        check_masking(model, mask_ratio=mask_ratio, norm_pix=norm_pix)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return MaskedAutoencoder(model, norm_pix=norm_pix, num_kept=model.num_kept(mask_ratio))


class MaskedAutoencoder(nn.Module):
    """MAE. `forward` gives the training loss, `reconstruct` the pixels.

    Keeps `num_kept` of `model.num_patches` patches. `pos_embed` and `decoder_pos_embed` are fixed: in the state dict,
    without a gradient.
    """

    def __init__(self, model: Model, *, norm_pix: bool, num_kept: int) -> None:
        super().__init__()
        width, depth, heads, patch_px = model.dims
        self.norm_pix = norm_pix
        self.num_kept = num_kept
        self.num_patches = model.num_patches
        self.patch_px = patch_px
        self.grid = model.image_px // patch_px

        self.patch_embed = PatchEmbed(model.image_px, patch_px, model.channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.num_patches, width), requires_grad=False)
        self.blocks = _blocks(Block, width, depth, heads)
        self.norm = LAYER_NORM(width)
        self._add_decoder(model.decoder, width, num_values=patch_px**2 * model.channels)
        self.reset_parameters()

    def _add_decoder(self, decoder: Decoder, width: int, *, num_values: int) -> None:
        self.decoder_embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder.width))
        positions = torch.empty(1, 1 + self.num_patches, decoder.width)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = _blocks(DecoderBlock, decoder.width, decoder.depth, decoder.heads)
        self.decoder_norm = LAYER_NORM(decoder.width)
        self.decoder_pred = nn.Linear(decoder.width, num_values)

    def reset_parameters(self) -> None:
        """Set all weights as the MAE code does, in place."""
        reset_encoder(self)
        with torch.no_grad():
            self.decoder_pos_embed.copy_(sincos_positions(self.decoder_pos_embed.shape[-1], self.grid))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, noise: Tensor, *, predict: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Mean squared error over the masked patches, a scalar in float32 (float64 for float64 images).

        `images`: float `[B, C, H, W]`, normalised; `noise`: `[B, L]`, any numbers, the lowest are kept. `predict`: what
        `reconstruct` gives instead; here too, because sharded weights are there for a call of the module alone.
        """
        if predict:
            return self.reconstruct(images, noise)
        masking = self.mask(noise)
        prediction = self._predict(images, masking)
        target, _, _ = self._target(images, masking.masked)
        # every image has as many masked patches: the mean of all values is the mean of patches' means
        return F.mse_loss(prediction.to(target.dtype), target)

    def mask(self, noise: Tensor) -> Masking:
        """Which patches are kept, which predicted: stable by number where noise `[B, L]` is equal."""
        assert noise.shape[1] == self.num_patches, (noise.shape, self.num_patches)
        by_noise = torch.argsort(noise, dim=1, stable=True)  # [B, L]
        return Masking(by_noise[:, : self.num_kept], by_noise[:, self.num_kept :])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels `[B, C, H, W]`, is_masked bool `[B, L]`): predicted patches among the given ones.

        Pixels are on the scale of `images`: where the target was normalised patch by patch, mean and deviation of the
        true patch are put back, for what the network predicts is a patch without them.
        """
        masking = self.mask(noise)
        prediction = self._predict(images, masking)
        _, mean, deviation = self._target(images, masking.masked)
        values = prediction.to(mean.dtype) * deviation + mean  # [B, M, p·p·C]
        patches = self._patches(images).to(values.dtype, copy=True)  # [B, h, w, p, p, C]
        batch, rows, columns = self._places(masking.masked)
        patches[batch, rows, columns] = values.unflatten(2, patches.shape[3:])
        pixels = patches.permute(0, 5, 1, 3, 2, 4).reshape(images.shape)  # [B, h, w, p, q, C] -> [B, C, h·p, w·q]
        is_masked = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device)
        return pixels, is_masked.scatter_(1, masking.masked, True)

    def _predict(self, images: Tensor, masking: Masking) -> Tensor:
        """Predicted values of the masked patches, `[B, M, p·p·C]`."""
        return self._decode(self._encode(images, masking.kept), masking)

    def _encode(self, images: Tensor, kept: Tensor) -> Tensor:
        """Class token and kept patches through the encoder: `[B, 1 + K, D]`."""
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias  # [D, C, p, p]: a convolution's
        patches = self._patches(images)[self._places(kept)].permute(0, 1, 4, 2, 3)  # [B, K, p, q, C] -> [B, K, C, p, q]
        tokens = F.linear(patches.flatten(2), weight.flatten(1), bias)  # [B, K, D]
        tokens = tokens + self.pos_embed[0, 1:][kept]
        class_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = torch.cat((class_token, tokens), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def _decode(self, encoded: Tensor, masking: Masking) -> Tensor:
        """Encoder's tokens `[B, 1 + K, D]` to predictions `[B, M, p·p·C]` of the masked patches."""
        seen = self.decoder_embed(encoded)
        # the official code unshuffles the tokens here; their position embeddings suffice
        unseen = self.mask_token.expand(len(seen), masking.masked.shape[1], -1)
        place = torch.cat((torch.zeros_like(masking.kept[:, :1]), masking.kept + 1, masking.masked + 1), dim=1)
        tokens = torch.cat((seen, unseen), dim=1) + self.decoder_pos_embed[0][place]  # [B, 1 + K + M, D']
        num_masked = masking.masked.shape[1]
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens)
        tokens = self.decoder_blocks[-1](tokens, num_masked)
        return self.decoder_pred(self.decoder_norm(tokens))

    def _target(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(target `[B, M, p·p·C]`, mean, deviation) of the masked patches, at least float32. Plain pixels: 0 and 1."""
        values = self._patches(images)[self._places(masked)].flatten(2)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if not self.norm_pix:
            return values, values.new_zeros(()), values.new_ones(())
        variance, mean = torch.var_mean(values, dim=2, keepdim=True)  # over n - 1, as the official code
        deviation = (variance + VARIANCE_EPS).sqrt()
        return (values - mean) / deviation, mean, deviation

    def _patches(self, images: Tensor) -> Tensor:
        """A view of `images` as patches, `[B, h, w, p, p, C]`: the official order of a patch's values."""
        p, grid = self.patch_px, self.grid
        assert images.shape[-2:] == (grid * p, grid * p), f"images {tuple(images.shape)} for {grid * p} px"
        # [B, C, h·p, w·q] -> [B, C, h, p, w, q] -> [B, h, w, p, q, C]
        return images.unflatten(3, (grid, p)).unflatten(2, (grid, p)).permute(0, 2, 4, 3, 5, 1)

    def _places(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (image, row, column) of patch numbers `[B, n]` into `_patches`."""
        batch = torch.arange(len(patches), device=patches.device).unsqueeze(1)
        return batch, patches // self.grid, patches % self.grid


def reset_encoder(model: MaskedAutoencoder | VisionTransformer) -> None:
    """Initialise a ViT in place as the MAE code does: linear layers, norms, patch embedding, class token, positions.

    Xavier uniform for linear layers and for the patch embedding as one flat linear layer; biases 0, but the patch
    embedding's stays as torch draws it for a convolution, as in the official code; norms 1 and 0; class token normal
    with deviation 0.02; positions sine-cosine, 0 for the tokens before the patches.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.Conv2d):
            part.reset_parameters()
    projection = model.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.data.flatten(1))  # a view: fan-in is C·p·p, fan-out the width
    nn.init.normal_(model.cls_token, std=0.02)
    positions = sincos_positions(model.pos_embed.shape[-1], model.patch_embed.grid_size[0])
    with torch.no_grad():
        model.pos_embed.zero_()[:, -positions.shape[1] :].copy_(positions)


class DecoderBlock(Block):
    """timm's block, which can leave out unused outputs: after the last block only masked tokens are predicted."""

    def forward(self, tokens: Tensor, wanted: int | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; with `wanted` to the last `wanted` tokens alone, the others being looked at."""
        if wanted is None:
            return super().forward(tokens)
        attention, width = self.attn, tokens.shape[2]
        normed, tokens = self.norm1(tokens), tokens[:, -wanted:]
        weight, bias = attention.qkv.weight, attention.qkv.bias  # [3 D, D]: query, key, value
        query = F.linear(normed[:, -wanted:], weight[:width], bias[:width])
        key, value = F.linear(normed, weight[width:], bias[width:]).chunk(2, dim=2)
        heads = [t.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
        tokens = tokens + attention.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


def _blocks(kind: type[Block], width: int, depth: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(
        kind(width, heads, mlp_ratio=MLP_RATIO, qkv_bias=True, norm_layer=LAYER_NORM) for _ in range(depth)
    )
