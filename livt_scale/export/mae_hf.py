"""A run's weights in the files of other code: MAE's `.pth`, Hugging Face's ViTMAE.

    mae   checkpoint.pth                      {"model": state dict}, tensors alone: what the official code loads
    hf    model.safetensors, config.json      what ViTMAEForPreTraining.from_pretrained reads

An export appears only after it was read back from its temporary folder, with the same bits under our names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.checkpoint.tensor_file import write_tensors, write_torch
from livt_scale.config.recipe import Recipe
from livt_scale.models.classifier import head_of
from livt_scale.models.layers import MLP_RATIO
from livt_scale.train.finetune import read_pretraining
from livt_scale.train.load_trained import load_trained
from livt_scale.util.atomic import new_folder, plain_disk_errors
from livt_scale.util.errors import ExportError, UsageError, nearest
from livt_scale.util.outside import real_path
from livt_scale.weights.importer import open_weights
from livt_scale.weights.layouts import to_hf
from livt_scale.weights.locate import SAFETENSORS

LAYOUTS = ("timm", "onnx", "peft", "livt", "mae", "hf")
PTH = "checkpoint.pth"


def export_as(
    run_dir: Path, out: Path, *, layout: str, stage: str, which: str | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the weights of `stage` of `run_dir` to the new folder `out` in `layout`, mae or hf; what was written.

    These layouts do not say whose the weights are, so what is there is replaced only with `force`, if it is an export.
    Raises UsageError (no such layout or stage, one that the layout has no place for), ExportError, RunError.
    """
    _check(layout, stage, which)
    if (out.exists() or out.is_symlink()) and not (force and _is_export(out)):
        raise ExportError(f"{out} is there already", remedy="give a new folder as --out, or --force for an export")
    state, lineage, recipe = read_pretraining(run_dir) if stage == "pretrain" else _classifier(run_dir, which)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    with plain_disk_errors(real_path(out), needed=num_bytes), new_folder(real_path(out)) as temporary:
        if layout == "mae":
            write_torch({"model": state}, temporary / PTH)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in to_hf(state).items()}
            write_tensors(tensors, temporary / SAFETENSORS, metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(hf_config(recipe), indent=2) + "\n", encoding="ascii")
        back = open_weights(temporary).state
        if back.keys() != state.keys() or not all(torch.equal(back[name], state[name]) for name in state):
            raise ExportError(f"what was written for {out} does not read back as the run's weights")
    file = PTH if layout == "mae" else SAFETENSORS
    return {"out": str(out), "file": str(out / file), "layout": layout, "tensors": len(state), "lineage": lineage}


def _is_export(out: Path) -> bool:
    """Whether `out` is a folder that holds the files of an export, in one layout or another, and no more."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return bool(names) and names <= {PTH, SAFETENSORS, "config.json"}


def hf_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of ViTMAEForPreTraining (transformers 5.24) for the masked autoencoder of `recipe`."""
    model, part = recipe.model, recipe.stages.pretrain
    assert part is not None
    width, depth, heads, patch_px = model.dims
    decoder = model.decoder
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": int(width * MLP_RATIO),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "image_size": model.image_px,
        "patch_size": patch_px,
        "num_channels": model.channels,
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": int(decoder.width * MLP_RATIO),
        "mask_ratio": part.mask_ratio,
        "norm_pix_loss": part.norm_pix,
    }


def _classifier(run_dir: Path, which: str | None) -> tuple[dict[str, Tensor], dict[str, Any], Recipe]:
    trained = load_trained(run_dir, which=which)
    if trained.tuning.freezes:
        raise UsageError(
            f"MAE's code has no place for what train: {trained.tuning.name} has added", remedy="give --to livt"
        )
    if not trained.recipe.model.is_vit:
        raise UsageError(f"MAE's code has no place for {trained.recipe.model.name}", remedy="give --to timm")
    head_of(trained.model)  # MAE has a linear one
    return dict(trained.model.state_dict()), trained.weights, trained.recipe


def _check(layout: str, stage: str, which: str | None) -> None:
    if layout not in LAYOUTS:
        raise UsageError(f"no layout is called {layout!r} ({nearest(layout, LAYOUTS)})")
    if stage not in ("pretrain", "finetune"):
        raise UsageError(f"no stage is called {stage!r} ({nearest(stage, ('pretrain', 'finetune'))})")
    if layout in ("timm", "onnx", "peft", "livt"):
        raise UsageError(f"{layout} has no place for a masked autoencoder", remedy="give --to mae or hf")
    if layout == "hf" and stage == "finetune":
        raise UsageError("Hugging Face's ViTMAE has no classifier", remedy="give --stage pretrain, or --to timm or mae")
    if which is not None and stage == "pretrain":
        raise UsageError(
            "--checkpoint chooses among fine-tuning checkpoints", remedy="leave it out, or give --stage finetune"
        )
