"""The names that other code gives to a ViT's weights, and ours: those of facebookresearch/mae, which are timm's too.

    mae, livt   blocks.0.attn.qkv.weight [3 D, D]   decoder_blocks.0.…, mask_token; fine-tuned: fc_norm, head
    timm        the same, without a decoder
    hf          vit.encoder.layer.0.attention.attention.query.weight [D, D], …key…, …value…; decoder.decoder_layers.0.…

Hugging Face's query, key and value are joined in that order, and cut again on the way back: no number changes, so that
both ways together give the same bits. transformers 5 has other names in memory than in its files; both are read, those
of the files are written. LiVT's code is MAE's, its names are the same.

Sources: models_mae.py and models_vit.py of facebookresearch/mae, models/ of XuZhengzhuo/LiVT; transformers 5.24,
`models/vit_mae`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from livt_scale.config.model import MODEL_SIZES
from livt_scale.config.recipe import Model
from livt_scale.util.errors import WeightsError, nearest
from livt_scale.util.outside import first_mistake

Layout = Literal["mae", "livt", "timm", "hf"]
MAX_BLOCKS = 1000
LAYOUTS: tuple[Layout, ...] = ("mae", "livt", "timm", "hf")

_BLOCK = r"(?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias)"
OURS = re.compile(
    rf"cls_token|pos_embed|patch_embed\.proj\.(?:weight|bias)|blocks\.\d+\.{_BLOCK}|(?:norm|fc_norm|head)\.(?:weight|bias)"
    rf"|mask_token|decoder_pos_embed|decoder_(?:embed|norm|pred)\.(?:weight|bias)|decoder_blocks\.\d+\.{_BLOCK}"
)
# Hugging Face's names, and ours, of the tensors outside the blocks
_HF_OUTSIDE = {
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.layernorm": "norm",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_embed": "decoder_embed",
    "decoder.decoder_norm": "decoder_norm",
    "decoder.decoder_pred": "decoder_pred",
}
_HF_IN_BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "attention.attention.query": "q",
    "attention.attention.key": "k",
    "attention.attention.value": "v",
}
_HF_IN_MEMORY = {  # of transformers 5
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "attention.q_proj": "q",
    "attention.k_proj": "k",
    "attention.v_proj": "v",
}
_HF_BLOCKS = re.compile(
    r"(vit\.encoder\.layer|vit\.layers|decoder\.decoder_layers|decoder\.decoder_encoder\.layer)"
    r"\.(\d+)\.(.+)\.(weight|bias)"
)


def detect(state: Mapping[str, Tensor]) -> Layout:
    """The layout of `state`, by its names. Raises WeightsError with the nearest guess if none matches."""
    if any(name in state for name in ("vit.embeddings.cls_token", "embeddings.cls_token")):
        return "hf"
    if {"cls_token", "patch_embed.proj.weight"} <= state.keys():
        return "mae" if "mask_token" in state or "decoder_embed.weight" in state else "timm"
    first = next(iter(state), "nothing")
    found = [name for name in state if OURS.fullmatch(name)]
    guess = f"the nearest is timm's: {len(found)} of {len(state)} names are like it" if found else "it is like none"
    raise WeightsError(
        f"this is no ViT in a layout of {', '.join(LAYOUTS)} ({guess}; its first name is {first!r})",
        remedy="give the weights of a plain ViT with a class token; --layout says which names it should have",
    )


def to_ours(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """`state` under our names. Raises WeightsError where a name has no place, or a part of a block is missing."""
    named = _from_hf(state) if layout == "hf" else dict(state)
    strange = [name for name in named if not OURS.fullmatch(name)]
    if strange:
        known = [*named.keys() - set(strange)] or ["cls_token", "pos_embed", "patch_embed.proj.weight"]
        close = nearest(strange[0], known)
        hint = f" ({close})" if close.startswith("did") else ""
        raise WeightsError(
            f"{len(strange)} of {len(named)} tensors have no place in our ViT: {', '.join(strange[:4])}{hint}",
            remedy="a ViT with layer scale, registers, query norm or a second token is another network",
        )
    return named


def to_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A masked autoencoder of ours under the names of ViTMAEForPreTraining's files."""
    outside = {ours: theirs for theirs, ours in _HF_OUTSIDE.items()}
    inside = {ours: theirs for theirs, ours in _HF_IN_BLOCK.items()}
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block is None:
            stem, dot, kind = name.rpartition(".")
            made[outside[name] if name in outside else f"{outside[stem]}{dot}{kind}"] = tensor
            continue
        stack = "decoder.decoder_layers" if block[1] else "vit.encoder.layer"
        parts = dict(zip("qkv", tensor.chunk(3), strict=True)) if block[3] == "attn.qkv" else {block[3]: tensor}
        made |= {f"{stack}.{block[2]}.{inside[part]}.{block[4]}": value for part, value in parts.items()}
    return made


def _from_hf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if "embeddings.cls_token" in state:  # ViTMAEModel: the encoder alone, without the prefix
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    made: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        block = _HF_BLOCKS.fullmatch(name)
        if block is None:
            stem, dot, kind = name.rpartition(".")
            ours = _HF_OUTSIDE.get(name) or (f"{_HF_OUTSIDE[stem]}{dot}{kind}" if stem in _HF_OUTSIDE else name)
            made[ours] = tensor
            continue
        part = (_HF_IN_BLOCK | _HF_IN_MEMORY).get(block[3])
        stack = ("decoder_blocks" if block[1].startswith("decoder") else "blocks") + f".{block[2]}"
        if part in ("q", "k", "v"):
            pieces.setdefault(f"{stack}.attn.qkv.{block[4]}", {})[part] = tensor
        else:
            made[f"{stack}.{part}.{block[4]}" if part else name] = tensor
    for name, by_part in pieces.items():
        missing = [part for part in "qkv" if part not in by_part]
        shapes = {tuple(tensor.shape) for tensor in by_part.values()}
        if missing or len(shapes) > 1:
            what = f"{', '.join(missing)} of it is missing" if missing else f"its parts differ in shape: {shapes}"
            raise WeightsError(f"{name} cannot be joined from query, key and value (q, k, v): {what}")
        made[name] = torch.cat([by_part[part] for part in "qkv"])
    return made


def infer_model(state: Mapping[str, Tensor], *, heads: int | None = None, decoder_heads: int | None = None) -> Model:
    """The recipe's `model` that these weights (our names) are of. Raises WeightsError.

    The number of heads leaves no trace in the weights: without `heads` it is that of the known size with this width,
    the decoder's 16 as published.
    """
    projection, positions = _need(state, "patch_embed.proj.weight", 4), _need(state, "pos_embed", 3)
    width, channels, patch_px, other_px = projection.shape
    grid = round((positions.shape[1] - 1) ** 0.5)
    if patch_px != other_px or grid**2 != positions.shape[1] - 1 or grid == 0:
        raise WeightsError(
            f"patches of {patch_px} x {other_px} px and {positions.shape[1]} positions: "
            "ours are square, with a position for the class token"
        )
    depth = _depth(state, "blocks")
    size = next((s for s, dims in MODEL_SIZES.items() if dims[0] == width), None)
    if heads is None and size is None:
        raise WeightsError(
            f"width {width} is of no known ViT, so its number of heads is unknown", remedy="give --heads"
        )
    size = size or "vit_b"
    decoder: dict[str, int] = {}
    if "mask_token" in state:
        decoder = {"width": _need(state, "mask_token", 3).shape[2], "depth": _depth(state, "decoder_blocks")}
    if decoder_heads is not None:
        decoder["heads"] = decoder_heads
    given = {"width": width, "depth": depth, "heads": heads, "patch_px": patch_px}
    overrides = {k: v for (k, v), usual in zip(given.items(), MODEL_SIZES[size], strict=True) if v not in (None, usual)}
    model = {"size": size, **overrides, "image_px": grid * patch_px, "channels": channels, "decoder": decoder}
    try:
        return Model.model_validate(model)
    except ValidationError as error:
        raise WeightsError(
            f"these weights are of no model that can be: {first_mistake(error)}",
            remedy="say --heads or --decoder-heads where that is what is wrong",
        ) from error


def _need(state: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    if name not in state:
        raise WeightsError(f"{name} is missing")
    if state[name].ndim != dims:
        raise WeightsError(f"{name} is {list(state[name].shape)}: it should have {dims} dimensions")
    return state[name]


def _depth(state: Mapping[str, Tensor], stack: str) -> int:
    """How many blocks are there; one with a larger number has no place in the network, which is reported then."""
    depth = len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})
    if depth > MAX_BLOCKS:
        raise WeightsError(f"{depth:,} {stack}: more than {MAX_BLOCKS}, which no ViT has")
    return depth
