"""The interface of a loss: a class of options with `build`, in the registry LOSSES. Needs no torch.

@LOSSES.register("focal")
class Focal(LossOptions):
    gamma: NonNegativeFloat = Field(2.0, description="…")

    def build(self, counts): ...     # counts: float64 [C], to a callable (logits [B, C], targets [B, C]) -> scalar
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from livt_scale.util.choices import Options
from livt_scale.util.errors import DataError, UsageError
from livt_scale.util.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Counts = npt.NDArray[np.float64]
Criterion = Callable[["Tensor", "Tensor"], "Tensor"]


class LossOptions(Options):
    """A loss and its options, as `stages.finetune.loss` of a recipe has them."""

    name: str

    # what of mixup, cutmix and smoothing its targets must not have been through, and why
    refuses: ClassVar[tuple[str, ...]] = ()
    refuses_because: ClassVar[str] = ""
    # softmax: one choice among the classes; sigmoid: a yes or no for each. Decides how logits are adjusted afterwards
    link: ClassVar[Literal["softmax", "sigmoid"]] = "softmax"
    no_single_class: ClassVar[str] = ""  # why it cannot be built for a single class; empty: it can

    @property
    def logit_scale(self) -> float:
        """What the loss multiplies the logits by."""
        return 1.0

    def build(self, counts: Counts) -> Criterion:
        """The loss for a training set with `counts` [C] images of each class, each at least 1."""
        raise NotImplementedError(f"{type(self).__name__}.build")

    def criterion(self, class_counts: Sequence[int] | npt.ArrayLike) -> Criterion:
        """(logits [B, C], soft targets [B, C]) -> scalar. Raises DataError as `check_counts`."""
        return self.build(self.check_counts(class_counts))

    def check_counts(self, class_counts: Sequence[int] | npt.ArrayLike) -> Counts:
        """Class counts as float64 [C]. Raises DataError where the loss has no value for them; needs no torch."""
        counts = checked_counts(class_counts)
        if len(counts) == 1 and self.no_single_class:
            raise DataError(
                f"{self.name} with a single class: {self.no_single_class}",
                remedy="use a set of two classes or more, or the loss bce",
            )
        return counts


LOSSES: Registry[type[LossOptions]] = Registry("loss")


def checked_counts(class_counts: Sequence[int] | npt.ArrayLike) -> Counts:
    """Class counts as float64 `[C]` (exact up to 2^53), each a positive integer; else DataError.

    UsageError for what are no numbers at all.
    """
    try:
        counts = np.asarray(class_counts, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"class_counts is of the type {type(class_counts).__name__}",
            remedy="give one number per class, as the class_counts of a livt.ShardSet",
        ) from error
    if counts.ndim != 1 or not counts.size:
        raise DataError(f"class counts of shape {list(counts.shape)}", remedy="give one number per class")
    for what, bad in (
        ("has no image", counts == 0),
        ("has an impossible count", ~(np.isfinite(counts) & (counts >= 0) & (counts == np.floor(counts)))),
    ):
        if bad.any():
            which = np.flatnonzero(bad)
            more = f" (and {len(which) - 1} more)" if len(which) > 1 else ""
            raise DataError(
                f"class {which[0]}{more} {what} in the training set: {counts[which[0]]:g}",
                remedy="every class needs at least one image: leave the class out, or add images of it",
            )
    return counts


def formulas() -> Any:
    """The formulas on tensors: imported when a loss is built, since torch takes seconds to import."""
    from livt_scale.losses import formulas as on_tensors

    return on_tensors
