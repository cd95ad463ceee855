"""`livt.build_classifier`: a Vision Transformer, a ResNet or a model of timm by name, as `livt train` fine-tunes it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveInt

from livt_scale.api.arguments import checked
from livt_scale.config import timm_models
from livt_scale.config.model import Model
from livt_scale.config.runtime import RecipePart
from livt_scale.models import classifier
from livt_scale.util.errors import UsageError

OF_TIMM = "timm/"  # and a name of timm.list_models()


class HeadAndDepth(RecipePart):
    """What a recipe takes from the training set and from its stage."""

    num_classes: PositiveInt
    drop_path: Annotated[float, Field(ge=0, lt=1)]


def build_classifier(
    size: str,
    *,
    num_classes: int,
    image_px: int | None = None,
    channels: int = 3,
    patch_px: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    drop_path: float = 0.0,
) -> classifier.AnyClassifier:
    """A classifier: images float [B, channels, image_px, image_px], normalised, to logits [B, num_classes].

    size: "vit_micro", "vit_ti", "vit_s", "vit_b", "vit_l", "vit_h", "resnet_micro", "resnet18", "resnet34",
    "resnet50", a size that was registered, or "timm/NAME", a classification model of timm. patch_px, width, depth,
    heads: of our ViT; None: from the size. image_px None: 224, or the size of timm's weights of that name. drop_path:
    rate of stochastic depth in the last block, linear from 0 in the first; in train(), `model(images, drop)` takes its
    random numbers, float32 [B, model.num_branches], from a `TrainLoader`, and `model(images)` draws them from torch's
    global generator, which also gives the initial weights. A ViT has the names and shapes of timm's, with mean pooling,
    and MAE's initialisation; the head of a ViT or a model of timm starts at almost 0, from equal odds. No weights are
    loaded or downloaded.

    Raises UsageError, which names the argument; calling the model on images of another shape raises it too.
    """
    shape: dict[str, Any] = {**_named(size), "patch_px": patch_px, "width": width, "depth": depth, "heads": heads}
    if image_px is not None:
        shape["image_px"] = image_px
    model = checked(Model, {**shape, "channels": channels})
    head = checked(HeadAndDepth, {"num_classes": num_classes, "drop_path": drop_path})
    return classifier.build_classifier(model, num_classes=head.num_classes, drop_path=head.drop_path)


def _named(size: str) -> dict[str, str]:
    """The recipe's field that `size` is given by."""
    if not size.startswith(OF_TIMM):
        return {"size": size}
    name = size.removeprefix(OF_TIMM)
    try:
        timm_models.check_name(name)
    except ValueError as error:
        raise UsageError(f"size is {size!r}", remedy=str(error)) from None
    return {"timm": name}
