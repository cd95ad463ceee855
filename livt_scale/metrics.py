"""Accuracy of a long-tailed classifier: over all, by shots, by class, with calibration and confusion.

`Tally` only counts, in one vector of integers: tallies of several ranks are added by one all_reduce, and the report is
the same to the last digit however the images are distributed. Each image is counted once, by the rank that saw it.

    tally = Tally(num_classes=10)
    tally.update(logits, labels)            # [B, 10] and [B], any device, as often as needed
    for sums in tally.tensors(): dist.all_reduce(sums)
    tally.report(class_counts, many_over=100, few_under=20)["top1"]["few"]

Why not torchmetrics: it keeps floating-point means per metric, so five collectives and an order-dependent last digit;
the tests compare the two. Groups: Liu et al., arXiv 1904.05160. Calibration error: Guo et al., arXiv 1706.04599.
PDC: Xu et al., arXiv 2302.14284, as its public code computes it (github.com/XuZhengzhuo/PDC).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from livt_scale.longtail import shot_groups

NUM_BINS = 15  # of the calibration error, as LiVT
MAX_CONFUSION_CLASSES = 1000  # a matrix for 8142 classes would be 0.5 GB, on every rank and in the report
CONFIDENCE_UNIT = 2**32  # confidences are summed as whole numbers of 1 / 2^32: integer sums know no order
TOP_K = 5
PDC_EPSILON = 1e-6  # of its authors, in the logarithms

Ints = npt.NDArray[np.int64]


class Tally:
    """Counts over evaluated images. `device` None: the first logits'."""

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        self.has_confusion = num_classes <= MAX_CONFUSION_CLASSES
        sizes = {
            "images": num_classes,
            "top1": num_classes,
            "top5": num_classes,
            "predicted": num_classes,
            "bin_images": NUM_BINS,
            "bin_right": NUM_BINS,
            "bin_confidence": NUM_BINS,
            "confusion": num_classes**2 if self.has_confusion else 0,
        }
        self._sizes = sizes
        self._sums = torch.zeros(sum(sizes.values()), dtype=torch.int64, device=device)
        self._placed = device is not None

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits float `[B, C]`, labels int64 `[B]` on the same device. Not one synchronisation.

        Ties go to the class of the lower number. A logit that is NaN or -inf is never right, nor among the first five.
        """
        assert logits.shape == (len(labels), self.num_classes), (tuple(logits.shape), self.num_classes)
        if not self._placed:
            self._sums, self._placed = self._sums.to(logits.device), True
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        predicted = logits.argmax(dim=1)
        own = logits.gather(1, labels.unsqueeze(1))  # [B, 1]
        numbers = torch.arange(self.num_classes, device=logits.device)
        behind = (logits < own) | ((logits == own) & (numbers >= labels.unsqueeze(1)))  # itself among them
        behind &= own > -torch.inf
        rank = self.num_classes - behind.sum(dim=1)  # [B]: 0 is the first
        is_first_five = (rank < TOP_K) & (own > -torch.inf).squeeze(1)  # with fewer classes too

        # confidence in (k/15, (k+1)/15] is bin k
        confidence = (logits.amax(dim=1) - logits.logsumexp(dim=1)).exp().nan_to_num(0).clamp(0, 1)
        bins = ((confidence * NUM_BINS).ceil().long() - 1).clamp(0, NUM_BINS - 1)
        sums = self._views()
        right = (rank == 0).long()
        sums["images"].index_add_(0, labels, torch.ones_like(labels))
        sums["top1"].index_add_(0, labels, right)
        sums["top5"].index_add_(0, labels, is_first_five.long())
        sums["predicted"].index_add_(0, predicted, torch.ones_like(predicted))
        sums["bin_images"].index_add_(0, bins, torch.ones_like(bins))
        sums["bin_right"].index_add_(0, bins, right)
        sums["bin_confidence"].index_add_(0, bins, (confidence.double() * CONFIDENCE_UNIT).round().long())
        if self.has_confusion:
            cells = labels * self.num_classes + predicted
            sums["confusion"].index_add_(0, cells, torch.ones_like(cells))

    def tensors(self) -> list[Tensor]:
        """What to add up over ranks, in place (`all_reduce` with SUM): int64, of the same shape on each rank."""
        return [self._sums]

    def report(
        self,
        class_counts: npt.ArrayLike,
        *,
        many_over: int,
        few_under: int,
        group_counts: npt.ArrayLike | None = None,
    ) -> dict[str, Any]:
        """The figures as plain JSON types, fractions of 1; None where there was no image.

        `class_counts`: training images of each class, which decide its group unless `group_counts` does. `all` is the
        mean over images; `mean_class` and the groups are means over classes, which on a balanced set is the same.
        `confusion[true][predicted]` counts images; None above 1000 classes.
        """
        sums = {name: view.cpu().numpy() for name, view in self._views().items()}
        counts = np.asarray(class_counts, dtype=np.int64)
        assert len(counts) == self.num_classes, (len(counts), self.num_classes)
        grouped_by = counts if group_counts is None else group_counts
        groups = shot_groups(grouped_by, many_over=many_over, few_under=few_under)
        num_images = int(sums["images"].sum())
        return {
            "num_samples": num_images,
            "top1": _accuracies(sums["top1"], sums["images"], groups),
            "top5": _accuracies(sums["top5"], sums["images"], groups),
            "per_class": _per_class(sums, counts, groups),
            "calibration": {
                "pdc": _pdc(sums["predicted"], sums["images"], counts),
                **_calibration(sums["bin_images"], sums["bin_right"], sums["bin_confidence"]),
            },
            "confusion": sums["confusion"].reshape(self.num_classes, -1).tolist() if self.has_confusion else None,
        }

    def _views(self) -> dict[str, Tensor]:
        return dict(zip(self._sizes, self._sums.split(list(self._sizes.values())), strict=True))


def _accuracies(right: Ints, images: Ints, groups: dict[str, Ints]) -> dict[str, float | None]:
    """Mean over images (`all`), over classes (`mean_class`) and over the classes of each group."""
    rates: dict[str, float | None] = {"all": _ratio(right.sum(), images.sum())}
    for name, classes in {**groups, "mean_class": np.arange(len(images))}.items():
        seen = classes[images[classes] > 0]
        rates[name] = float(np.mean(right[seen] / images[seen])) if len(seen) else None
    return rates


def _per_class(sums: dict[str, Ints], counts: Ints, groups: dict[str, Ints]) -> list[dict[str, Any]]:
    group_of = {int(c): name for name, classes in groups.items() for c in classes}
    return [
        {
            "class": c,
            "group": group_of[c],
            "train_images": int(counts[c]),
            "images": int(sums["images"][c]),
            "top1": _ratio(sums["top1"][c], sums["images"][c]),
            "top5": _ratio(sums["top5"][c], sums["images"][c]),
        }
        for c in range(len(counts))
    ]


def _calibration(images: Ints, right: Ints, confidence: Ints) -> dict[str, Any]:
    """Expected calibration error: mean gap of confidence and accuracy over bins, weighted by their images."""
    bins = [
        {
            "from": k / NUM_BINS,
            "to": (k + 1) / NUM_BINS,
            "images": int(images[k]),
            "accuracy": _ratio(right[k], images[k]),
            "confidence": _ratio(confidence[k] / CONFIDENCE_UNIT, images[k]),
        }
        for k in range(NUM_BINS)
    ]
    gaps = np.abs(right - confidence / CONFIDENCE_UNIT)  # of a bin, times its images
    return {"ece": _ratio(gaps.sum(), images.sum()), "bins": bins}


def _pdc(predicted: Ints, images: Ints, train_counts: Ints) -> float | None:
    """Predictive distribution calibration, from counts by class: KL(labels || predictions) / KL(labels || training).

    0: each class is predicted as often as it occurs; 1: as if in proportion to its training images. None: there are no
    images, or the training set has the same distribution as they have, to one image a class.
    """
    if not images.sum() or not train_counts.sum():
        return None
    labels, predictions, training = (n / n.sum() for n in (images, predicted, train_counts))
    if np.allclose(labels * train_counts.sum(), train_counts, rtol=0, atol=1):
        return None  # the ratio of two numbers near 0
    log_labels = np.log(labels + PDC_EPSILON)
    of_model, of_training = (labels @ (log_labels - np.log(q + PDC_EPSILON)) for q in (predictions, training))
    return float(of_model / of_training)


def _ratio(part: np.generic | float, whole: np.generic | float) -> float | None:
    return float(part) / float(whole) if whole else None
