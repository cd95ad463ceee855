"""DeiT-LT's distillation: a CNN that is already trained teaches a second token of the ViT (`stages.finetune.distill`).

    loss = (1 - α) · L(class head, targets) + α · w_t · CE(distillation head, t),      t = argmax of the teacher

L is the recipe's loss. The teacher is given the same images as the ViT, mixed and augmented, which are out of its
training distribution: that is the point of the method. w_t is 1 at first and later, for the last epochs, the
class-balanced weight of the class that the teacher answers (deferred re-weighting). Both heads are averaged in
evaluation (`models.classifier.DistilledClassifier`). The teacher answers in evaluation mode and is not trained, sharded
or saved; its weights' digest is, so that a run does not resume with another one.

Two things differ from the public code: weighted losses are averaged over images, as in cb_ce, not divided by the
weights in the batch, so that they do not depend on how a batch is divided; and mixup stays on to the end.

Source: DeiT-LT, arXiv 2404.02900, section 3, and its public code; DeiT, arXiv 2012.12877.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy.typing as npt
import torch
from torch import Tensor, nn

from livt_scale.config.recipe import Data, Recipe
from livt_scale.distributed import precision
from livt_scale.distributed.ddp import with_fast_convolutions
from livt_scale.losses.builtin import ClassBalancedCrossEntropy, CrossEntropy
from livt_scale.train.load_trained import Trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import UsageError


class Distillation:
    """The teacher of a run, on its device, and the loss that it takes part in."""

    def __init__(self, recipe: Recipe, teacher: Trained, *, counts: npt.ArrayLike, device: torch.device) -> None:
        part = recipe.stages.finetune
        assert part is not None
        assert part.distill is not None
        self._alpha = part.distill.alpha
        network = teacher.model.eval().requires_grad_(False).to(device)
        self.teacher: nn.Module = with_fast_convolutions(network, device, recipe.parallel)
        self.digest = weights_digest(self.teacher.state_dict())
        self._from_epoch = part.distill.reweight_after * part.epochs
        self._criterion = part.loss.criterion(counts)
        self._plain = CrossEntropy().criterion(counts)
        self._weighted = ClassBalancedCrossEntropy(beta=part.distill.beta).criterion(counts)
        self._device, self._precision = device, recipe.parallel.precision
        ours, theirs = recipe.data, teacher.recipe.data
        self._pixels = None if (ours.mean, ours.std) == (theirs.mean, theirs.std) else self._to_its_pixels(ours, theirs)

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """The teacher's class of each image, int64 [B]; images: float [B, C, H, W], normalised by the recipe."""
        if self._pixels is not None:
            scale, shift = self._pixels
            images = images * scale + shift
        logits: Tensor = precision.infer(self.teacher, self._device, self._precision, images)
        return logits.argmax(dim=1)

    def loss(self, logits: tuple[Tensor, Tensor], targets: Tensor, answers: Tensor, *, epoch: int) -> Tensor:
        """The loss above, a scalar. logits: of class and distillation head, [B, classes] each."""
        of_class, of_teacher = logits
        distil = self._weighted if epoch >= self._from_epoch else self._plain
        return (1 - self._alpha) * self._criterion(of_class, targets) + self._alpha * distil(of_teacher, answers)

    def _to_its_pixels(self, ours: Data, theirs: Data) -> tuple[Tensor, Tensor]:
        """(scale, shift), [C, 1, 1] each, from pixels as the recipe normalises them to those that the teacher takes."""
        m, s, its_m, its_s = (
            torch.tensor(v, device=self._device).view(-1, 1, 1) for v in (ours.mean, ours.std, theirs.mean, theirs.std)
        )
        return s / its_s, (m - its_m) / its_s


def open_teacher(recipe: Recipe, class_names: Sequence[str]) -> Trained:
    """The teacher of `recipe`, on the CPU. Raises UsageError if it does not fit, and what `open_trained` raises.

    class_names: of the training set, in order.
    """
    part = recipe.stages.finetune
    assert part is not None
    assert part.distill is not None
    path = part.distill.teacher
    teacher = open_trained(Path(path))
    names, model = teacher.classes.names, teacher.recipe.model
    if len(names) != len(class_names):
        raise UsageError(
            f"the teacher {path} knows {len(names)} classes, and the training set has {len(class_names)}",
            remedy="give a teacher that was trained on the same classes",
        )
    for k, (theirs, ours) in enumerate(zip(names, class_names, strict=True)):
        if theirs != ours:
            raise UsageError(
                f"class {k} of the teacher {path} is {theirs!r}, that of the training set {ours!r}",
                remedy="give a teacher that was trained on the same classes, in the same order",
            )
    for field in ("image_px", "channels"):
        if getattr(model, field) != getattr(recipe.model, field):
            raise UsageError(
                f"the teacher {path} takes model.{field} {getattr(model, field)}, and the recipe has "
                f"{getattr(recipe.model, field)}",
                remedy="teacher and ViT are given the same images: train the teacher on such images",
            )
    return teacher


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types and bytes of all tensors: the same for a run and its export."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(array.data)
    return total.hexdigest()
