"""The losses that ship: each one class, with its options, their sources, and its numbers by class.

`livt_scale.losses` has the table, docs/losses.md the derivations. The formulas on tensors are in
`livt_scale.losses.formulas`; what follows from class counts is here, in float64.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from livt_scale.losses.options import LOSSES, Counts, Criterion, LossOptions, formulas

BelowOne = Annotated[float, Field(ge=0, lt=1)]


@LOSSES.register("ce")
class CrossEntropy(LossOptions):
    """Soft cross entropy, mean over the batch."""

    name: Literal["ce"] = "ce"

    def build(self, counts: Counts) -> Criterion:  # noqa: ARG002
        f = formulas()
        return f.Loss("ce", f.cross_entropy)


@LOSSES.register("ls_ce")
class SmoothedCrossEntropy(LossOptions):
    """Cross entropy that smooths its targets itself."""

    name: Literal["ls_ce"] = "ls_ce"
    smoothing: BelowOne = Field(0.1, description="ε of the loss's smoothing (default: Szegedy et al., 1512.00567)")
    refuses: ClassVar[tuple[str, ...]] = ("smoothing",)
    refuses_because: ClassVar[str] = "smooths its targets itself (loss.smoothing)"

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("ls_ce", f.smoothed_cross_entropy, np.full(len(counts), self.smoothing))


@LOSSES.register("bce")
class BinaryCrossEntropy(LossOptions):
    """Binary cross entropy, sum over classes, mean over the batch."""

    name: Literal["bce"] = "bce"
    link: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"

    def build(self, counts: Counts) -> Criterion:  # noqa: ARG002
        f = formulas()
        return f.Loss("bce", f.binary_cross_entropy)


@LOSSES.register("bal_ce")
class BalancedCrossEntropy(LossOptions):
    """Balanced softmax (2007.10740): cross entropy of z + τ·log π."""

    name: Literal["bal_ce"] = "bal_ce"
    tau: NonNegativeFloat = Field(1.0, description="strength of the margin (default: LiVT, which uses 1 to 1.05)")

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("bal_ce", f.cross_entropy, self.tau * _log_prior(counts))


@LOSSES.register("bal_bce")
class BalancedBinaryCrossEntropy(LossOptions):
    """LiVT's loss (2212.02015, equation 13): binary cross entropy of z + τ·(log π - log(1 - π))."""

    name: Literal["bal_bce"] = "bal_bce"
    tau: NonNegativeFloat = Field(1.0, description="strength of the margin (default: LiVT, which uses 1 to 1.05)")
    link: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"
    no_single_class: ClassVar[str] = "its share is 1 and its margin infinite"

    def build(self, counts: Counts) -> Criterion:
        others = counts.sum() - counts
        # log π - log(1 - π) without either: 1 - π loses all digits where one class is nearly everything
        margin = self.tau * (np.log(counts) - np.log(others))
        f = formulas()
        return f.Loss("bal_bce", f.binary_cross_entropy, margin)


@LOSSES.register("cb_ce")
class ClassBalancedCrossEntropy(LossOptions):
    """Class-balanced loss (1901.05555): cross entropy weighted by (1 - β) / (1 - β^n), with mean 1.

    The mean is over the images: torch's own weighted mean divides by the weights in the batch, so it would depend on
    how a batch is divided.
    """

    name: Literal["cb_ce"] = "cb_ce"
    beta: BelowOne = Field(
        0.9999,
        description="how slowly more images of a class stop counting (default: the paper, which uses 0.9 to 0.9999)",
    )

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("cb_ce", f.weighted_cross_entropy, _class_balanced_weights(counts, self.beta))


@LOSSES.register("cb_bce")
class ClassBalancedBinaryCrossEntropy(LossOptions):
    """Class-balanced loss as LiVT's code has it under mixup (CB_BCE): binary cross entropy, each class weighted.

    Each term has the weight of its class, for all images alike, not the weight of the image's class.
    """

    name: Literal["cb_bce"] = "cb_bce"
    beta: BelowOne = Field(0.9999, description="how slowly more images of a class stop counting (default: LiVT's code)")
    link: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("cb_bce", f.weighted_binary_cross_entropy, _class_balanced_weights(counts, self.beta))


@LOSSES.register("ldam")
class LargeMargin(LossOptions):
    """LDAM (1906.07413): cross entropy of s·z, less s·m on the true class; m ∝ n^(-1/4)."""

    name: Literal["ldam"] = "ldam"
    max_margin: NonNegativeFloat = Field(0.5, description="margin of the smallest class (default: the paper)")
    scale: PositiveFloat = Field(30.0, description="what logits are multiplied by (default: the paper's code)")
    no_single_class: ClassVar[str] = "there is no other class to keep a margin from"

    @property
    def logit_scale(self) -> float:
        return self.scale

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("ldam", f.large_margin(self.scale), self.max_margin * (counts.min() / counts) ** 0.25)


@LOSSES.register("mislas")
class LabelAwareSmoothing(LossOptions):
    """MiSLAS (2104.00466): cross entropy, smoothed most for the largest class.

    Concave, the form that the paper found best: a quarter of a sine over n from the smallest to the largest class.
    Classes that all have as many images are all the smallest.
    """

    name: Literal["mislas"] = "mislas"
    head_smoothing: BelowOne = Field(0.3, description="ε of the largest class (default: the paper; it uses 0.1 to 0.4)")
    tail_smoothing: BelowOne = Field(0.0, description="ε of the smallest class (default: the paper; it uses 0 to 0.1)")
    refuses: ClassVar[tuple[str, ...]] = ("smoothing",)
    refuses_because: ClassVar[str] = "smooths its targets itself (loss.head_smoothing, loss.tail_smoothing)"

    def build(self, counts: Counts) -> Criterion:
        place = (counts - counts.min()) / max(1.0, counts.max() - counts.min())
        smoothing = self.tail_smoothing + (self.head_smoothing - self.tail_smoothing) * np.sin(place * math.pi / 2)
        f = formulas()
        return f.Loss("mislas", f.smoothed_cross_entropy, smoothing)


@LOSSES.register("lade")
class Disentangled(LossOptions):
    """LADE (2012.00321): balanced softmax and a regulariser over the batch."""

    name: Literal["lade"] = "lade"
    dv_weight: NonNegativeFloat = Field(
        0.1, description="weight of its regulariser (default: the authors' code; for iNaturalist 2018 it has 0.05)"
    )
    dv_penalty: NonNegativeFloat = Field(
        0.1, description="λ within its regulariser (default: the authors' code; for iNaturalist 2018 it has 0.5)"
    )
    refuses: ClassVar[tuple[str, ...]] = ("mixup", "cutmix", "smoothing")
    refuses_because: ClassVar[str] = "needs to know which class an image is of"

    def build(self, counts: Counts) -> Criterion:
        f = formulas()
        return f.Loss("lade", f.disentangled(self.dv_weight, self.dv_penalty), _log_prior(counts))


@LOSSES.register("focal")
class Focal(LossOptions):
    """Focal loss (1708.02002): binary cross entropy, each term weighted by (1 - its probability)^γ."""

    name: Literal["focal"] = "focal"
    gamma: NonNegativeFloat = Field(2.0, description="how little the easy terms weigh (default: the paper)")
    link: ClassVar[Literal["softmax", "sigmoid"]] = "sigmoid"

    def build(self, counts: Counts) -> Criterion:  # noqa: ARG002
        f = formulas()
        return f.Loss("focal", f.focal(self.gamma))


def _class_balanced_weights(counts: Counts, beta: float) -> Counts:
    """(1 - β) / (1 - β^n) of each class, with mean 1."""
    # 1 - β^n with all its digits; β = 0 counts each class as one image
    effective = -np.expm1(counts * math.log(beta)) / (1 - beta) if beta else np.ones_like(counts)
    weights = 1 / effective
    return weights * (len(counts) / weights.sum())


def _log_prior(counts: Counts) -> Counts:
    return np.log(counts) - math.log(counts.sum())
