"""The losses of balanced fine-tuning: logits `[B, C]` and soft targets `[B, C]` to a scalar.

| name    | logits become                                | then                                             |
| ce      | z                                            | soft cross entropy, mean over the batch          |
| bce     | z                                            | binary cross entropy, sum over classes, mean     |
| bal_ce  | z + τ·log π            (balanced softmax)    | as ce                                            |
| bal_bce | z + τ·(log π - log(1 - π))       (LiVT)      | as bce                                           |

π_c = n_c / N is the share of class c in the training set. The margin acts in training alone; prediction uses z. With
counts (90, 10) the Bal-BCE margins are ±log 9: the frequent class must earn its odds. Half-precision logits are
computed in float32, margins in float64.

Source: LiVT, arXiv 2212.02015, equations 6 to 13; balanced softmax, arXiv 2007.10740; logit adjustment, 2007.07314.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from livt_scale.errors import DataError, UsageError, nearest

Counts = npt.NDArray[np.float64]


class Loss:
    """A loss on logits shifted by a margin. Call it with logits and soft targets, both `[B, C]`, for a scalar."""

    def __init__(self, name: str, entropy: Callable[[Tensor, Tensor], Tensor], margin: Counts | None) -> None:
        self.name = name
        self.entropy = entropy
        self.margin = None if margin is None else torch.from_numpy(margin)  # float64 [C]
        self._placed = self.margin  # the same on the logits' device, in their precision

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch, in float32 at least. `targets`: shares in [0, 1], soft ones as well as one-hot."""
        assert logits.shape == targets.shape, f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.margin is not None:
            if self._placed is None or (self._placed.device, self._placed.dtype) != (logits.device, logits.dtype):
                self._placed = self.margin.to(logits.device, logits.dtype)  # once, not at each step
            logits = logits + self._placed
        return self.entropy(logits, targets.to(logits.dtype))

    def __repr__(self) -> str:
        return f"Loss({self.name!r})"


def make_loss(name: str, class_counts: Sequence[int] | npt.ArrayLike, **options: Any) -> Loss:
    """The loss of that name for a training set with `class_counts` images of each class.

    `options`: `tau` (strength of the margin, 1 by default) for `bal_ce` and `bal_bce`; an option that is None counts as
    not given. Raises UsageError for an unknown name or option, DataError for a class without images.
    """
    if name not in LOSSES:
        raise UsageError(f"unknown loss {name!r}", remedy=nearest(name, LOSSES))
    build = LOSSES[name]
    takes = [p for p in inspect.signature(build).parameters if p != "counts"]
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in takes:
            raise UsageError(
                f"the loss {name!r} does not take {key!r}",
                remedy=f"its options: {', '.join(takes)}" if takes else "it has no options",
            )
    return build(checked_counts(class_counts), **given)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Smoothed one-hot float32 `[B, C]` of int64 labels `[B]`: ε/C everywhere, 1 - ε + ε/C on the class."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels.unsqueeze(1), 1 - smoothing + off)


def checked_counts(class_counts: Sequence[int] | npt.ArrayLike) -> Counts:
    """Class counts as float64 `[C]` (exact up to 2^53), each a whole number of at least 1; else DataError."""
    counts = np.asarray(class_counts, dtype=np.float64)
    if counts.ndim != 1 or not counts.size:
        raise DataError(f"class counts of shape {list(counts.shape)}", remedy="give one number a class")
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


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over classes, mean over the batch: in the usual mean over both, 1000 classes would weigh a thousandth."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def _ce(counts: Counts) -> Loss:  # noqa: ARG001  counts are checked for every loss alike
    return Loss("ce", _soft_cross_entropy, None)


def _bce(counts: Counts) -> Loss:  # noqa: ARG001
    return Loss("bce", _binary_cross_entropy, None)


def _bal_ce(counts: Counts, tau: float = 1.0) -> Loss:
    return Loss("bal_ce", _soft_cross_entropy, _checked_tau(tau) * (np.log(counts) - math.log(counts.sum())))


def _bal_bce(counts: Counts, tau: float = 1.0) -> Loss:
    others = counts.sum() - counts
    if len(counts) == 1:
        raise DataError(
            "bal_bce with a single class: its share is 1 and its margin infinite",
            remedy="use a set of two classes or more, or the loss bce",
        )
    # log π - log(1 - π) without either: 1 - π loses all digits where one class is nearly everything
    return Loss("bal_bce", _binary_cross_entropy, _checked_tau(tau) * (np.log(counts) - np.log(others)))


def _checked_tau(tau: float) -> float:
    if not (math.isfinite(tau) and tau >= 0):
        raise UsageError(f"tau is {tau}", remedy="give a finite number, 0 or more; the paper uses 1 to 1.05")
    return float(tau)


LOSSES: dict[str, Callable[..., Loss]] = {"ce": _ce, "bce": _bce, "bal_ce": _bal_ce, "bal_bce": _bal_bce}
