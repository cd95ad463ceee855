"""The losses of balanced fine-tuning: logits `[B, C]` and soft targets `[B, C]` to a scalar.

| name    | logits become                             | then                                                       |
| ce      | z                                         | soft cross entropy, mean over the batch                    |
| ls_ce   | z                                         | as ce, targets smoothed by 0.1                             |
| bce     | z                                         | binary cross entropy, sum over classes, mean over batch    |
| bal_ce  | z + τ·log π         (balanced softmax)    | as ce                                                      |
| bal_bce | z + τ·(log π - log(1 - π))    (LiVT)      | as bce                                                     |
| cb_ce   | z                                         | as ce, weighted by (1 - β) / (1 - β^n), with mean 1        |
| ldam    | s·z, less s·m on the true class           | as ce; m ∝ n^(-1/4), the largest 0.5                       |
| mislas  | z                                         | as ce, smoothed by 0.3 (largest class) to 0 (smallest)     |
| lade    | z + log π                                 | as ce, plus 0.1 times a regulariser over the batch         |
| focal   | z                                         | as bce, each term weighted by (1 - its probability)^γ      |

π_c = n_c / N is the share of class c in the training set. What a loss does to logits it does in training alone;
prediction uses z. With counts (90, 10) the Bal-BCE margins are ±log 9: the frequent class must earn its odds.
Half-precision logits are computed in float32, numbers by class in float64. The formulas of logits are those of
`livt_scale.losses.formulas`; what follows from class counts is here. docs/losses.md has the derivation, the options,
and which targets each takes.

Source: LiVT, arXiv 2212.02015, equations 6 to 13, and its public code; balanced softmax, 2007.10740; logit adjustment,
2007.07314; class-balanced, 1901.05555; LDAM, 1906.07413; MiSLAS, 2104.00466; LADE, 2012.00321; focal, 1708.02002.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from livt_scale.losses import formulas
from livt_scale.util.errors import DataError, UsageError, nearest

Counts = npt.NDArray[np.float64]
Form = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Loss:
    """A formula with its numbers by class. Call it with logits and soft targets, both `[B, C]`, for a scalar."""

    def __init__(self, name: str, form: Form, by_class: Counts | None = None) -> None:
        self.name = name
        self.form = form
        self.by_class = None if by_class is None else torch.from_numpy(by_class)  # float64 [C]: margins or weights
        self._placed = self.by_class  # the same on the logits' device, in the precision of the computation

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch, in float32 at least. `targets`: shares in [0, 1], soft ones as well as one-hot.

        `lade` takes one-hot targets alone, else UsageError.
        """
        assert logits.shape == targets.shape, f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)}"
        if self.by_class is not None:
            device, dtype = logits.device, torch.promote_types(logits.dtype, torch.float32)
            if self._placed is None or (self._placed.device, self._placed.dtype) != (device, dtype):
                self._placed = self.by_class.to(device, dtype)  # once, not at each step
        return self.form(logits, targets, self._placed)

    def __repr__(self) -> str:
        return f"Loss({self.name!r})"


def make_loss(name: str, class_counts: Sequence[int] | npt.ArrayLike, **options: Any) -> Loss:
    """The loss of that name for a training set with `class_counts` images of each class.

    `options`: the keywords of the loss's builder below, as `tau` (strength of the margin, 1 by default) for `bal_ce`
    and `bal_bce`; an option that is None counts as not given. Raises UsageError for an unknown name or option and an
    impossible value, DataError for a class without images.
    """
    if name not in LOSSES:
        raise UsageError(f"unknown loss {name!r}", remedy=nearest(name, LOSSES))
    takes = options_of(name)
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in takes:
            raise UsageError(
                f"the loss {name!r} does not take {key!r}",
                remedy=f"its options: {', '.join(takes)}" if takes else "it has no options",
            )
    return LOSSES[name](checked_counts(class_counts), **given)


def options_of(name: str) -> dict[str, float]:
    """What the loss of that name takes, with the defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "counts"}


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


def _ce(counts: Counts) -> Loss:  # noqa: ARG001  counts are checked for every loss alike
    return Loss("ce", formulas.cross_entropy)


def _ls_ce(counts: Counts, smoothing: float = 0.1) -> Loss:
    share = _checked("smoothing", smoothing, most=1, usual="the usual value is 0.1")
    return Loss("ls_ce", formulas.smoothed_cross_entropy, np.full(len(counts), share))


def _bce(counts: Counts) -> Loss:  # noqa: ARG001
    return Loss("bce", formulas.binary_cross_entropy)


def _bal_ce(counts: Counts, tau: float = 1.0) -> Loss:
    return Loss("bal_ce", formulas.cross_entropy, _checked_tau(tau) * _log_prior(counts))


def _bal_bce(counts: Counts, tau: float = 1.0) -> Loss:
    others = counts.sum() - counts
    if len(counts) == 1:
        raise DataError(
            "bal_bce with a single class: its share is 1 and its margin infinite",
            remedy="use a set of two classes or more, or the loss bce",
        )
    # log π - log(1 - π) without either: 1 - π loses all digits where one class is nearly everything
    margin = _checked_tau(tau) * (np.log(counts) - np.log(others))
    return Loss("bal_bce", formulas.binary_cross_entropy, margin)


def _cb_ce(counts: Counts, beta: float = 0.9999) -> Loss:
    """Mean over the images: torch's own weighted mean divides by the weights drawn, so by how a batch is cut too."""
    _checked("beta", beta, most=1, usual="the paper uses 0.9 to 0.9999")
    # 1 - β^n with all its digits; β = 0 counts each class as one image
    effective = -np.expm1(counts * math.log(beta)) / (1 - beta) if beta else np.ones_like(counts)
    weights = 1 / effective
    return Loss("cb_ce", formulas.weighted_cross_entropy, weights * (len(counts) / weights.sum()))


def _ldam(counts: Counts, max_margin: float = 0.5, scale: float = 30.0) -> Loss:
    _checked("max_margin", max_margin, usual="the paper uses 0.5")
    if not _checked("scale", scale, usual="the paper's code uses 30"):
        raise UsageError("scale is 0: every logit would be 0", remedy="the paper's code uses 30")
    if len(counts) == 1:
        raise DataError(
            "ldam with a single class: there is none to keep a margin from",
            remedy="use a set of two classes or more, or the loss bce",
        )
    return Loss("ldam", formulas.large_margin(float(scale)), max_margin * (counts.min() / counts) ** 0.25)


def _mislas(counts: Counts, head_smoothing: float = 0.3, tail_smoothing: float = 0.0) -> Loss:
    """Concave, the form that the paper found best: a quarter of a sine over n from the smallest to the largest class.

    Classes that all have as many images are all the smallest.
    """
    head = _checked("head_smoothing", head_smoothing, most=1, usual="the paper uses 0.1 to 0.4")
    tail = _checked("tail_smoothing", tail_smoothing, most=1, usual="the paper uses 0 to 0.1")
    place = (counts - counts.min()) / max(1.0, counts.max() - counts.min())
    smoothing = tail + (head - tail) * np.sin(place * math.pi / 2)
    return Loss("mislas", formulas.smoothed_cross_entropy, smoothing)


def _lade(counts: Counts, dv_weight: float = 0.1, dv_penalty: float = 0.1) -> Loss:
    weight = _checked("dv_weight", dv_weight, usual="the authors use 0.1, for iNaturalist 2018 0.05")
    penalty = _checked("dv_penalty", dv_penalty, usual="the authors use 0.1, for iNaturalist 2018 0.5")
    return Loss("lade", formulas.disentangled(weight, penalty), _log_prior(counts))


def _focal(counts: Counts, gamma: float = 2.0) -> Loss:  # noqa: ARG001
    return Loss("focal", formulas.focal(_checked("gamma", gamma, usual="the paper uses 2")))


def _log_prior(counts: Counts) -> Counts:
    return np.log(counts) - math.log(counts.sum())


def _checked_tau(tau: float) -> float:
    return _checked("tau", tau, usual="the paper uses 1 to 1.05")


def _checked(option: str, value: float, *, usual: str, most: float = math.inf) -> float:
    """`value`, if it lies in [0, most); else UsageError."""
    if not 0 <= value < most:
        below = f" and below {most:g}" if most < math.inf else ""
        raise UsageError(f"{option} is {value}", remedy=f"give a finite number, 0 or more{below}; {usual}")
    return float(value)


LOSSES: dict[str, Callable[..., Loss]] = {
    "ce": _ce,
    "ls_ce": _ls_ce,
    "bce": _bce,
    "bal_ce": _bal_ce,
    "bal_bce": _bal_bce,
    "cb_ce": _cb_ce,
    "ldam": _ldam,
    "mislas": _mislas,
    "lade": _lade,
    "focal": _focal,
}
