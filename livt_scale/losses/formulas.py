"""What the losses sum over the images of a batch: formulas of logits `[B, C]`, targets `[B, C]` and a number a class.

A soft target is a distribution over classes, and a loss under it is the mean of the loss of a class drawn from it. So
every formula here is linear in a row of targets, and one-hot rows give the published form. Only the regulariser of
LADE differs: it depends on the entire batch, and on hard labels.

With 1024 images of 8142 classes the logits are 33 MB, and each operation on all of them writes 33 MB more. `RowSum`
processes the rows in groups that fit the processor's cache, keeps only logits and targets, and recomputes a group
when its gradient is requested: it needs no more memory than the gradient itself, and is no slower
(docs/losses.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from livt_scale.util.errors import UsageError

Counts = npt.NDArray[np.float64]

GROUP_ELEMENTS = {
    "cpu": 2
    ** 18,  # for each thread, 1 MB of float32: larger ones leave the cache, smaller ones wait for threads oftener
    "other": 2**24,  # few and large kernels are faster on a GPU
}
RowFormula = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ClassLoss(nn.Module):
    """What every loss that a user is given does with its arguments.

    logits: float `[B, C]`. targets: soft ones, float `[B, C]`, or labels, int64 `[B]`. Returns a scalar. Raises
    UsageError for other shapes and, on a CPU, for labels outside 0 … C - 1 (on a GPU the check would wait for it).
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.ndim != 2:
            raise UsageError(f"logits are {list(logits.shape)}", remedy="give [images, classes]")
        if targets.ndim == 1 and not targets.is_floating_point():
            targets = one_hot(targets, logits)
        if logits.shape != targets.shape:
            raise UsageError(
                f"logits are {list(logits.shape)}, targets {list(targets.shape)}",
                remedy="give soft targets of the shape of the logits, or one int64 label per row of them",
            )
        return self.value(logits, targets)

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of logits and soft targets, both `[B, C]`."""
        raise NotImplementedError


class CustomLoss(ClassLoss):
    """A loss from outside the package, which gets soft targets whatever its caller has."""

    def __init__(self, name: str, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.name = name
        self.criterion = criterion

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(logits, targets)

    def extra_repr(self) -> str:
        return repr(self.name)


class Loss(ClassLoss):
    """A formula with its numbers by class, which follow the logits to their device."""

    def __init__(self, name: str, form: RowFormula, by_class: Counts | None = None) -> None:
        super().__init__()
        self.name = name
        self.form = form
        self.by_class = None if by_class is None else torch.from_numpy(by_class)  # float64 [C]: margins or weights
        self._placed = self.by_class  # the same on the logits' device, in the precision of the computation

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the batch, in float32 at least. `targets`: shares in [0, 1], soft ones as well as one-hot.

        `lade` takes one-hot targets alone, else UsageError.
        """
        if self.by_class is not None:
            if logits.shape[1] != len(self.by_class):
                raise UsageError(
                    f"logits are {list(logits.shape)}, and the loss is for {len(self.by_class)} classes",
                    remedy="build model and loss for the same class counts",
                )
            device, dtype = logits.device, torch.promote_types(logits.dtype, torch.float32)
            if self._placed is None or (self._placed.device, self._placed.dtype) != (device, dtype):
                self._placed = self.by_class.to(device, dtype)  # once, not at each step
        return self.form(logits, targets, self._placed)

    def extra_repr(self) -> str:
        return repr(self.name)


def one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels int64 `[B]` as one-hot float32 targets of the shape of `logits` `[B, C]`. Raises UsageError."""
    if len(labels) != len(logits):
        raise UsageError(f"logits are {list(logits.shape)}, with {len(labels)} labels", remedy="give one label per row")
    if labels.is_cpu and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise UsageError(
            f"labels are from {int(labels.min())} to {int(labels.max())}, logits have {logits.shape[1]} classes",
            remedy=f"number the classes from 0 to {logits.shape[1] - 1}",
        )
    return soft_targets(labels.long(), logits.shape[1])


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """Smoothed one-hot float32 `[B, C]` of int64 labels `[B]`: ε/C everywhere, 1 - ε + ε/C on the class."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels.unsqueeze(1), 1 - smoothing + off)


@dataclass(frozen=True)
class RowSum:
    """A loss that is a sum over rows, as a mean over the batch.

    `value`: (logits `[b, C]` in float32 at least, targets `[b, C]`, numbers `[C]` or None) to the sum over those rows.
    `slope`: the same arguments to the sum's gradient by the logits `[b, C]`; None: autograd finds it.
    """

    value: RowFormula
    slope: RowFormula | None = None

    def __call__(self, logits: Tensor, targets: Tensor, by_class: Tensor | None) -> Tensor:
        """A scalar, float32 at least. The gradient goes to `logits`, in their dtype, with no second derivative."""
        total: Tensor = _GroupedSum.apply(self, logits, targets, by_class)
        return total / len(logits)


class _GroupedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, formula: RowSum, logits: Tensor, targets: Tensor, by_class: Tensor | None) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(logits, targets, by_class)
        sums = [formula.value(x, t, by_class) for x, t in _groups(logits, targets)]
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[None, Tensor, None, None]:
        formula, (logits, targets, by_class) = ctx.formula, ctx.saved_tensors
        gradient = torch.empty_like(logits)
        outs = gradient.split(_rows_a_group(logits))
        for (x, t), out in zip(_groups(logits, targets), outs, strict=True):
            slope = formula.slope(x, t, by_class) if formula.slope else _autograd_slope(formula.value, x, t, by_class)
            torch.mul(slope, scale, out=out)  # rounded to half precision after the loss scale, not before
        return None, gradient, None, None


def _groups(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows, dtype = _rows_a_group(logits), torch.promote_types(logits.dtype, torch.float32)
    for x, t in zip(logits.split(rows), targets.split(rows), strict=True):
        yield x.to(dtype), t.to(dtype)


def _rows_a_group(logits: Tensor) -> int:
    if logits.is_cpu:
        return max(1, GROUP_ELEMENTS["cpu"] * torch.get_num_threads() // logits.shape[1])
    return max(1, GROUP_ELEMENTS["other"] // logits.shape[1])


def _autograd_slope(value: RowFormula, logits: Tensor, targets: Tensor, by_class: Tensor | None) -> Tensor:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(value(logits, targets, by_class), logits)[0]


# --- softmax ---


def _cross_entropy(logits: Tensor, targets: Tensor, margin: Tensor | None) -> Tensor:
    return F.cross_entropy(logits if margin is None else logits + margin, targets, reduction="sum")


def _weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """-Σ t_c·w_c·log p_c"""
    assert weights is not None
    return F.cross_entropy(logits, targets, weight=weights, reduction="sum")


def _smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: Tensor | None) -> Tensor:
    """A label y becomes (1 - s_y) of y and s_y spread over all classes; the mean over y of the target does so too."""
    assert smoothing is not None
    spread = (targets * smoothing).sum(dim=1, keepdim=True) / logits.shape[1]  # [b, 1]; @ would be bf16 under autocast
    return F.cross_entropy(logits, torch.addcmul(targets, targets, smoothing, value=-1).add_(spread), reduction="sum")


def large_margin(scale: float) -> RowSum:
    """Cross entropy of s·z with s·m_y taken off the true class y alone (LDAM, arXiv 1906.07413, equation 13).

    Computes all classes y together, in `[b, C]` and not `[b, C, C]`: with R_y = log Σ_{j≠y} exp(s·z_j), the weight
    of the others, the loss of y is softplus(R_y - s·(z_y - m_y)).
    """

    def value(logits: Tensor, targets: Tensor, margins: Tensor | None) -> Tensor:
        assert margins is not None
        x = logits * scale
        log_p = F.log_softmax(x, dim=1)
        top = x.argmax(dim=1, keepdim=True)
        # R = log Σ_j exp(x_j) + log(1 - p): exact for p ≤ 1/2, so for all but the largest; its others are summed again
        share = log_p.exp().scatter(1, top, 0.0)
        others = (x - log_p) + torch.log1p(-share)
        others = others.scatter(1, top, x.scatter(1, top, -math.inf).logsumexp(dim=1, keepdim=True))
        return (targets * F.softplus(others - x + scale * margins, threshold=_SOFTPLUS_IS_LINEAR)).sum()

    return RowSum(value)


_SOFTPLUS_IS_LINEAR = 50.0  # log(1 + exp(x)) = x in float64 too; torch's own 20 is float32's


# --- sigmoid; sum over classes, as in the mean over them 1000 classes would weigh a thousandth ---


def _binary_cross_entropy(logits: Tensor, targets: Tensor, margin: Tensor | None) -> Tensor:
    return _binary_terms(logits if margin is None else logits + margin, targets).sum()


def _weighted_binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The yes or no of class c, for every image, weighted by w_c."""
    assert weights is not None
    return _binary_terms(logits, targets).mul_(weights).sum()


def _binary_terms(x: Tensor, targets: Tensor) -> Tensor:
    """[b, C] max(x, 0) - t·x + log(1 + exp(-|x|)): no term is lost to a larger one of the other sign."""
    return torch.addcmul(x.clamp_min(0), targets, x, value=-1).add_(_log1p(x.abs().neg_().exp_()))


def _log1p(u: Tensor) -> Tensor:
    """log(1 + u) of u in [0, 1], to the last digit or two.

    On CPUs torch's own takes 9 ns an element, half of all that Bal-BCE costs, and `log` 1.5 ns (torch 2.14). So log(w)
    of the rounded w = 1 + u, and what the rounding took, u - (w - 1), by the slope 1/w.
    """
    if not u.is_cpu:
        return u.log1p()
    w = u + 1
    return (u - (w - 1)).div_(w).add_(w.log_())


def _binary_cross_entropy_slope(logits: Tensor, targets: Tensor, margin: Tensor | None) -> Tensor:
    return torch.sigmoid(logits if margin is None else logits + margin).sub_(targets)


def _weighted_binary_cross_entropy_slope(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    assert weights is not None
    return torch.sigmoid(logits).sub_(targets).mul_(weights)


def focal(gamma: float) -> RowSum:
    """Binary cross entropy, each term weighted by (1 - its probability)^γ (arXiv 1708.02002, equation 4, no α)."""

    def value(logits: Tensor, targets: Tensor, _: Tensor | None) -> Tensor:
        yes, no = -F.logsigmoid(logits), -F.logsigmoid(-logits)  # -log σ and -log(1 - σ)
        return (targets * yes * torch.exp(-gamma * no) + (1 - targets) * no * torch.exp(-gamma * yes)).sum()

    return RowSum(value)


cross_entropy = RowSum(_cross_entropy)
weighted_cross_entropy = RowSum(_weighted_cross_entropy)
smoothed_cross_entropy = RowSum(_smoothed_cross_entropy)
binary_cross_entropy = RowSum(_binary_cross_entropy, _binary_cross_entropy_slope)
weighted_binary_cross_entropy = RowSum(_weighted_binary_cross_entropy, _weighted_binary_cross_entropy_slope)


# --- the entire batch ---


def disentangled(weight: float, penalty: float) -> RowFormula:
    """Balanced softmax and `weight` times the regularised Donsker-Varadhan bound of each class (LADE, 2012.00321).

    The bound of class c is a - b - penalty·b²: a is the mean of z_c over the images of c in this batch (0 without
    any), b is log mean exp(z_c - log(C·π_c)) over all B images. The regulariser is minus their mean under π, as in
    the authors' code. `by_class`: log π. Raises UsageError for targets that are not one-hot: an image that is 0.3 a cat
    is no sample of cats. On a GPU only the first batch is checked: the host would wait for each.
    """
    is_checked = False

    def form(logits: Tensor, targets: Tensor, log_prior: Tensor | None) -> Tensor:
        assert log_prior is not None
        x = logits.to(torch.promote_types(logits.dtype, torch.float32))
        t = targets.to(x.dtype)
        nonlocal is_checked
        if (t.is_cpu or not is_checked) and not bool(((t.amax(dim=1) == 1) & (t.sum(dim=1) == 1)).all()):
            raise UsageError(
                "the loss 'lade' got soft targets, and it needs to know which class an image is of",
                remedy="switch mixup, cutmix and smoothing off (0), or take another loss",
            )
        is_checked = True
        of_class = (t * x).sum(dim=0) / t.sum(dim=0).clamp(min=1)  # [C]
        of_all = x.logsumexp(dim=0) - math.log(len(x)) - log_prior - math.log(x.shape[1])
        bound = of_class - of_all - penalty * of_all.square()
        return cross_entropy(logits, targets, log_prior) - weight * (log_prior.exp() * bound).sum()

    return form
