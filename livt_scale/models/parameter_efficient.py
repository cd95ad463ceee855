"""Parameter-efficient fine-tuning: freeze a classifier and add what a method of `stages.finetune.train` trains.

    classifier = build_classifier(model, num_classes=10, drop_path=0.1)
    load_encoder(classifier, state)                   # weights have plain names: load them first
    tune(classifier, Lora(rank=8))                    # in place; logits are unchanged, since B starts as 0
    …                                                 # train
    merge(classifier, Lora(rank=8))                   # plain again, with the same logits to rounding

LoRA's layers are those of the library `peft`. The other methods are a few lines each, which it does not have for vision
(AdaptFormer) or has for language models alone (prompts). A module that is extended keeps its names.

Dropout of LoRA depends on the image, not on the rank or the number of calls: `drop` has one more column of uniform
numbers, from which a hash makes the mask of each layer. So a run resumes bit for bit, other ranks drop the same, and
activation checkpointing computes the same again.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from livt_scale.config.recipe import Model
from livt_scale.config.tuning import LORA_ADAPTER, AdaptFormer, Lora, Tuning, Vpt, tuned
from livt_scale.models.classifier import HEAD_STD, PROBE_STD, AnyClassifier, build_classifier, head_name
from livt_scale.models.timm_backbone import TimmClassifier
from livt_scale.util.errors import UsageError


def build_tuned(
    model: Model,
    *,
    num_classes: int,
    drop_path: float,
    tuning: Tuning,
    head_norm: bool = False,
    cosine_scale: float | None = None,
) -> AnyClassifier:
    """`build_classifier` and `tune`, where no pretrained weights are loaded between the two."""
    classifier = build_classifier(
        model,
        num_classes=num_classes,
        drop_path=drop_path,
        head_std=head_std(tuning),
        head_norm=head_norm,
        cosine_scale=cosine_scale,
    )
    tune(classifier, tuning)
    return classifier


def head_std(tuning: Tuning) -> float:
    """Standard deviation of the head's initial weights."""
    return PROBE_STD if tuning.head_alone else HEAD_STD


def tune(classifier: AnyClassifier, tuning: Tuning) -> None:
    """Freeze `classifier` and add what `tuning` trains, in place, from torch's global generator. No effect for `all`.

    Raises UsageError where the network has nothing that the method changes, or `peft` is not installed.
    """
    if not tuning.freezes:
        return
    # a parameter that is frozen already has no part in the logits, or is fixed
    shapes = {name: tuple(p.shape) for name, p in classifier.named_parameters() if p.requires_grad}
    try:
        expected = list(tuned(tuning, shapes, head=head_name(classifier)))
        layers = tuning.adapted(shapes, head=head_name(classifier))
    except ValueError as error:
        raise UsageError(f"stages.finetune.train: {error}") from None
    if isinstance(tuning, Lora):
        _add_lora(classifier, tuning, layers)
    elif isinstance(tuning, AdaptFormer):
        for layer in layers:
            _add_bottleneck(classifier.get_submodule(layer), tuning)
    elif isinstance(tuning, Vpt):
        _add_prompts(classifier, tuning)
    trained = {parameter.name for parameter in expected if parameter.trained}
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_(name in trained)
    if isinstance(classifier, TimmClassifier):
        _check_calls(classifier)
        classifier.is_frozen = True
        classifier.train(classifier.training)


@torch.no_grad()
def merge(classifier: AnyClassifier, tuning: Tuning) -> None:
    """Make a plain network of a tuned one, in place, with the same logits to rounding. Only where `tuning.merges`."""
    assert tuning.merges, tuning.name
    if not isinstance(tuning, Lora):
        return
    for name, layer in lora_layers(classifier):
        layer.merge()
        classifier.set_submodule(name, layer.get_base_layer())
    classifier._forward_pre_hooks.clear()


def lora_layers(classifier: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of each linear layer with an adapter of peft."""
    return [(name, module) for name, module in classifier.named_modules() if hasattr(module, "lora_A")]


def need_peft() -> None:
    """Raise UsageError unless the library is installed."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "LoRA needs the library peft, not installed here",
            remedy="install it with: pip install 'livt-scale[peft]'",
        )


def lora_config(tuning: Lora, layers: Iterable[str], *, head: str | None = None) -> Any:
    """peft's LoraConfig for these linear layers; head: saved with the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=list(layers),
        modules_to_save=None if head is None else [head],
    )


def _add_lora(classifier: AnyClassifier, tuning: Lora, layers: tuple[str, ...]) -> None:
    need_peft()
    from peft import inject_adapter_in_model

    inject_adapter_in_model(lora_config(tuning, layers), classifier, adapter_name=LORA_ADAPTER)
    del classifier.peft_config  # where it stays, peft takes a copy without the adapter to have it still
    dropouts = []
    for number, (_, layer) in enumerate(lora_layers(classifier)):
        layer.cast_input_dtype_enabled = False  # autocast chooses the precision; a copy in fp32 would be kept besides
        if tuning.dropout:
            dropouts.append(ImageDropout(tuning.dropout, salt=number))
            layer.lora_dropout[LORA_ADAPTER] = dropouts[-1]
    if dropouts:
        classifier.register_forward_pre_hook(_Draw(dropouts), with_kwargs=True)


@torch.no_grad()
def _check_calls(classifier: TimmClassifier) -> None:
    """Raise UsageError for an adapter whose layer is never called: some models of timm read its weight instead."""
    layers, called = lora_layers(classifier), set()
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers]
    was_training = classifier.training
    if layers:
        classifier.eval()(torch.zeros(1, *classifier.image_shape, device=next(classifier.parameters()).device))
    classifier.train(was_training)
    for hook in hooks:
        hook.remove()
    unused = dict.fromkeys(name.rpartition(".")[2] for name, _ in layers if name not in called)
    if unused:
        others = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, _ in layers if name in called))
        raise UsageError(
            f"stages.finetune.train: {', '.join(unused)} of this model of timm is not called as a layer, so LoRA would "
            "have no effect there",
            remedy=f"set targets: [{others}]",
        )


class ImageDropout(nn.Module):
    """Dropout whose mask follows from one uniform number per image and from `salt`. Identity in evaluation."""

    def __init__(self, rate: float, *, salt: int) -> None:
        super().__init__()
        self.rate, self.salt = rate, salt
        self.seeds: Tensor | None = None  # int64 [B]

    def forward(self, x: Tensor) -> Tensor:  # [B · k, …], the rows of an image together
        if not self.training or self.seeds is None:
            return x
        index = torch.arange(x.numel() // len(self.seeds), device=x.device)
        bits = _mixed(self.seeds[:, None] + _mixed(index + (self.salt << 40)))  # [B, values of an image]
        kept = (bits & 0xFFFFFF) >= int(self.rate * 2**24)
        return x * (kept.view(x.shape).to(x.dtype) / (1 - self.rate))


def _mixed(x: Tensor) -> Tensor:
    """An int64 hash, element by element: the finaliser of MurmurHash3, with arithmetic shifts."""
    x = (x ^ (x >> 33)) * -0xAE502812AA7333
    x = (x ^ (x >> 33)) * -0x3B314601E57A13AD
    return x ^ (x >> 33)


class _Draw:
    """Takes the last column of `drop` off the classifier's arguments, and gives it to the dropouts."""

    def __init__(self, dropouts: list[ImageDropout]) -> None:
        self._dropouts = dropouts

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        images, drop = args[0], args[1] if len(args) > 1 else kwargs.get("drop")
        own = torch.rand(len(images), device=images.device) if drop is None else drop[:, -1]
        seeds = own.float().contiguous().view(torch.int32).long()
        for dropout in self._dropouts:
            dropout.seeds = seeds
        rest = None if drop is None or drop.shape[1] == 1 else drop[:, :-1]
        return (images, rest), {}


class _WithBottleneck(nn.Module):
    """An MLP with AdaptFormer's bottleneck beside it."""

    adapter: Bottleneck

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + self.adapter(x)


class Bottleneck(nn.Module):
    """s · up(ReLU(down(x))), which starts as 0."""

    def __init__(self, width: int, tuning: AdaptFormer) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, tuning.bottleneck), nn.Linear(tuning.bottleneck, width)
        self.scale = tuning.scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(F.relu(self.down(x)))
        return out * self.scale


def _add_bottleneck(mlp: Any, tuning: AdaptFormer) -> None:
    mlp.adapter = Bottleneck(mlp.fc2.out_features, tuning)
    mlp.__class__ = _extended(_WithBottleneck, type(mlp))  # type: ignore[arg-type]  # a class is hashable


class _WithPrompts(nn.Module):
    """The module before the first block, with trained tokens behind the class token and registers."""

    prompts: nn.Parameter
    after: int

    def forward(self, x: Tensor) -> Tensor:  # [B, tokens, D] to [B, tokens + prompts, D]
        x = super().forward(x)
        prompts = self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)  # len(x) would be a constant of an ONNX graph
        return torch.cat([x[:, : self.after], prompts, x[:, self.after :]], dim=1)


def _add_prompts(classifier: AnyClassifier, tuning: Vpt) -> None:
    if not isinstance(classifier, VisionTransformer):
        raise UsageError(
            f"stages.finetune.train: vpt adds tokens to a plain ViT, not to a {type(classifier).__name__}",
            remedy="choose lora or bitfit for this model",
        )
    width = classifier.embed_dim
    before: Any = classifier.norm_pre
    before.prompts = nn.Parameter(torch.empty(1, tuning.prompts, width))
    patch_values = math.prod(classifier.patch_embed.proj.weight.shape[1:])
    bound = math.sqrt(6 / (patch_values + width))  # VPT's public code: Xavier, as of the patch embedding
    nn.init.uniform_(before.prompts, -bound, bound)
    before.after = classifier.num_prefix_tokens
    before.__class__ = _extended(_WithPrompts, type(before))  # type: ignore[arg-type]  # a class is hashable
    classifier.num_prefix_tokens += tuning.prompts  # tokens that are not patches: left out of their mean


@cache
def _extended(extension: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with the extension's methods before its own, as torch's `fully_shard` adds its methods to a module."""
    return type(kind.__name__, (extension, kind), {"__module__": __name__})
