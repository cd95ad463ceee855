"""Stage 2's network where the recipe names a model of timm: timm's own, with a new head.

    model = build_timm(Model(timm="convnext_atto", image_px=64), num_classes=10, drop_path=0.1, head_std=2e-5)
    model(images, drop)          drop: uniform numbers [B, model.num_branches]; None: from torch's generator

Names, shapes and logits are timm's, so that an export is plain timm. Added: the head's initialisation, and where a
training run's random numbers come from. Each drop path that timm calls once per image takes its numbers from a column
of `drop`, so that they belong to the samples, as in `models.classifier`. All other numbers (dropout, patch dropout, a
drop path over windows) come from torch's generator, which is seeded by the last column of the rank's images for this
one forward pass: a resumed run repeats them, another number of ranks draws others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from livt_scale.config import timm_models
from livt_scale.config.recipe import Model
from livt_scale.config.timm_models import TimmFacts
from livt_scale.models.layers import DropPath, check_images, coins


class TimmClassifier(nn.Module):
    """Logits of images. A network of timm is given this class as a base by `build_timm`, with its names unchanged."""

    facts: TimmFacts
    image_shape: tuple[int, int, int]
    drop_paths: tuple[str, ...]  # those that take a column of `drop` each
    num_branches: int  # columns of `drop`
    is_frozen: bool  # but for a few parameters (`models.parameter_efficient`): batch norm keeps its statistics

    def forward(self, images: Tensor, drop: Tensor | None = None) -> Tensor:
        """Images float `[B, C, H, W]` to logits `[B, num_classes]`. Raises UsageError for images of another size.

        `drop`: uniform numbers in [0, 1) `[B, num_branches]`, of use in training alone; None: from torch's generator.
        """
        check_images(images, self.image_shape)
        with self._draw(images, drop) if self.training and self.num_branches else nullcontext():
            logits: Tensor = super().forward(images)
        return logits

    def _draw(self, images: Tensor, drop: Tensor | None) -> AbstractContextManager[None]:
        """Give each drop path its column of `drop`. Within the context, other random numbers follow from the last."""
        drop = coins(images, self.num_branches, given=drop)
        for k, name in enumerate(self.drop_paths):
            module = self.get_submodule(name)
            assert isinstance(module, DropPath), name
            module.draw(drop[:, k])
        return _seeded_by(drop[:, -1]) if self.facts.draws else nullcontext()

    def train(self, mode: bool = True) -> TimmClassifier:
        super().train(mode)
        if self.is_frozen:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def build_timm(model: Model, *, num_classes: int, drop_path: float, head_std: float) -> TimmClassifier:
    """The classifier of a recipe's `model`, freshly initialised from torch's global generator.

    Parameters that have no part in the logits are frozen: no gradient would ever reach them.
    """
    facts = model.timm_facts
    network: Any = timm_models.create(model.timm_spec, num_classes=num_classes, drop_path=drop_path, takes=facts.takes)
    for name in facts.unused:
        network.get_parameter(name).requires_grad_(False)
    drop_paths = facts.drop_paths if drop_path else ()
    for name in drop_paths:
        network.set_submodule(name, DropPath(network.get_submodule(name).drop_prob))
    kind: type[nn.Module] = type(network)
    network.__class__ = _class_of(kind)  # type: ignore[arg-type]  # a class is hashable
    classifier: TimmClassifier = network
    classifier.facts, classifier.drop_paths, classifier.is_frozen = facts, drop_paths, False
    classifier.num_branches = model.num_uniforms(drop_path=drop_path)
    classifier.image_shape = (model.channels, model.image_px, model.image_px)
    reset_head(classifier, std=head_std)
    return classifier.train()


@torch.no_grad()
def reset_head(classifier: TimmClassifier, *, std: float) -> None:
    """Initialise the last layer: weights of a truncated normal distribution, biases of 0."""
    head: Any = classifier.get_submodule(classifier.facts.head)
    trunc_normal_(head.weight, std=std)
    if head.bias is not None:
        nn.init.zeros_(head.bias)


@cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with TimmClassifier's methods before its own, as torch's `fully_shard` adds its methods to a module."""
    return type(kind.__name__, (TimmClassifier, kind), {"__module__": __name__})


@contextmanager
def _seeded_by(uniforms: Tensor) -> Iterator[None]:
    """torch's generators, seeded by `uniforms` float32 [B] and put back afterwards. Waits for the device."""
    seed = int(uniforms.float().view(torch.int32).long().sum())
    devices = [uniforms.device] if uniforms.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
