"""An export as timm reads it: timm's part of config.json, timm's network, and the comparison of its logits with ours.

timm.create_model("local-dir:exports/try", pretrained=True)      # the same logits, no other argument
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from livt_scale.checkpoint.tensor_file import read_safetensors
from livt_scale.config.model import MODEL_SIZES, USUAL_FIRST_WIDTH
from livt_scale.config.recipe import Model
from livt_scale.data.image.transforms import eval_crop
from livt_scale.models.classifier import head_inputs, head_name
from livt_scale.models.cosine_head import CosineHead
from livt_scale.models.layers import vit_args
from livt_scale.models.resnet import use_small_stem
from livt_scale.train.export_info import WEIGHTS, ExportInfo
from livt_scale.util.errors import ExportError

# timm builds any ViT from any of these names, given all arguments; the nearest one helps a reader recognise the model.
TIMM_NAMES = {
    "vit_micro": "vit_tiny_patch16_224",
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "vit_h": "vit_huge_patch14_224",
    "resnet_micro": "resnet18",  # with other arguments
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
}
DISTILLED = "deit_base_distilled_patch16_224"  # with other arguments


def timm_config(info: ExportInfo) -> dict[str, Any]:
    """config.json as timm reads it (`timm.models._hub.load_model_config_from_path`, checked with timm 1.0.31)."""
    model, num_classes = info.model, len(info.class_names)
    of_kind, first_conv, classifier = _of_kind(model)
    return {
        "architecture": _timm_name(model),
        "num_classes": num_classes,
        **of_kind,
        "label_names": list(info.class_names),
        "pretrained_cfg": {
            "input_size": [model.channels, model.image_px, model.image_px],
            "fixed_input_size": "img_size" in of_kind["model_args"],
            "interpolation": info.interpolation,
            "crop_pct": eval_crop(model.image_px, crop_pct=info.crop_pct),
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": first_conv,
            "classifier": classifier,
            "paper_ids": "arXiv:2212.02015",
        },
    }


def _timm_name(model: Model) -> str:
    """For a size from outside the package: that of the ViT whose width is the nearest."""
    if model.timm is not None:
        return model.timm.partition(".")[0]
    if model.distillation_token:
        return DISTILLED
    vits = [size for size in TIMM_NAMES if size in MODEL_SIZES]
    width = model.dims.width if model.is_vit else 0
    nearest = min(vits, key=lambda size: abs(MODEL_SIZES[size].width - width))
    return TIMM_NAMES.get(model.size, TIMM_NAMES[nearest])


def _of_kind(model: Model) -> tuple[dict[str, Any], Any, str | list[str]]:
    """(`model_args`, features and pooling; the first convolution; the classifier)."""
    if model.timm is not None:
        return _of_timm(model)
    return _of_vit(model) if model.is_vit else _of_resnet(model)


def _of_timm(model: Model) -> tuple[dict[str, Any], Any, str]:
    """What the recipe gives to `timm.create_model`; all else is the architecture's own."""
    import timm

    facts = model.timm_facts
    args = {"in_chans": model.channels, **model.args}
    if "img_size" in facts.takes:
        args["img_size"] = model.image_px
    first_conv = timm.get_pretrained_cfg(model.timm, allow_unregistered=False).first_conv
    return {"model_args": args}, first_conv, facts.head


def _of_vit(model: Model) -> tuple[dict[str, Any], str, str | list[str]]:
    pooling = "token" if model.distillation_token else "avg"
    args = {**vit_args(model), "global_pool": pooling}
    of_kind = {"num_features": model.dims.width, "global_pool": pooling, "model_args": args}
    return of_kind, "patch_embed.proj", ["head", "head_dist"] if model.distillation_token else "head"


def _of_resnet(model: Model) -> tuple[dict[str, Any], str, str]:
    """timm's arguments cannot express the small stem: `timm_network` describes how to read the weights then."""
    width = model.stage_widths[-1] * (4 if model.has_bottlenecks else 1)
    return {"num_features": width, "global_pool": "avg", "model_args": _resnet_args(model)}, "conv1", "fc"


def _resnet_args(model: Model) -> dict[str, Any]:
    """The arguments that differ from the defaults of timm's network of the same name."""
    args: dict[str, Any] = {"in_chans": model.channels}
    if model.stage_widths[0] != USUAL_FIRST_WIDTH:
        args |= {"layers": list(model.stage_blocks), "channels": list(model.stage_widths)}
    return args


def timm_network(folder: Path, shape: Model, *, has_head: bool = True) -> nn.Module:
    """timm's network with the weights in `folder`, from that folder alone, in evaluation mode; its output without
    `has_head`: the features that a head is given.

    A ResNet for images up to 64 px is timm's with another stem, which no argument of timm's makes (1.0.31): asked for
    "local-dir:", timm refuses the shape of `conv1`. A few lines replace the stem (`models.resnet.use_small_stem`).
    """
    import timm

    bare = {} if has_head else {"num_classes": 0}
    if not shape.has_small_stem:
        network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True, **bare)
        return network.eval()
    tensors, _ = read_safetensors(folder / WEIGHTS)
    if not has_head:
        del tensors["fc.weight"]
    num_classes = len(tensors["fc.bias"]) if has_head else 0
    network = timm.create_model(TIMM_NAMES[shape.size], num_classes=num_classes, **_resnet_args(shape))
    use_small_stem(network, shape.stage_widths[0])
    network.load_state_dict(tensors)
    return network.eval()


def compare_with_timm(model: nn.Module, folder: Path, shape: Model) -> None:
    """Raise ExportError unless timm, from `folder` alone, gives the logits of `model`; of a cosine head, which timm
    does not have, the features before it."""
    has_head = not isinstance(model.get_submodule(head_name(model)), CosineHead)
    with torch.random.fork_rng(devices=[]):
        theirs = timm_network(folder, shape, has_head=has_head)
    check_same_logits(model, theirs, shape, reader="timm", tolerance=1e-6, has_head=has_head)


def check_same_logits(
    model: nn.Module, theirs: nn.Module, shape: Model, *, reader: str, tolerance: float, has_head: bool = True
) -> None:
    """Raise ExportError unless `theirs`, as `reader` has opened it, gives the logits of `model` for two images.

    tolerance: of a difference, over the largest logit. has_head: false: `theirs` gives features, which are compared.
    """
    one = (shape.channels, shape.image_px, shape.image_px)
    images = torch.randn(2, *one, generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    was_training = model.training
    with torch.inference_mode(), head_inputs(model) as given:
        logits = model.eval()(images.to(device))
        ours = (logits if has_head else given[0]).cpu()
        read_back = theirs(images)
    model.train(was_training)
    if not torch.allclose(ours, read_back, rtol=0, atol=tolerance * float(ours.abs().max())):
        gap = float((ours - read_back).abs().max())
        what = "logits" if has_head else "features"
        raise ExportError(f"{reader} reads other {what} from the export than the model gives: they differ by {gap:.2g}")
