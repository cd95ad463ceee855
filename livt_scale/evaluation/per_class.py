"""One row a class: how many images it had in training, how often it is found, and what it is taken for.

`top1` and `recall` are one number under its two names: the share of a class's images that are given to it. `precision`
is the share of the images given to a class that belong there. `mean_confidence` is the mean, over the images of a
class, of the largest softmax probability. `confused_with` is the other class that most of its images are given to.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from livt_scale.evaluation.logits import CHUNK, Outputs
from livt_scale.longtail import shot_groups
from livt_scale.metrics import TOP_K
from livt_scale.util.atomic import write_atomic

CSV_MARK = b"class,name,group,"  # how a file of ours starts


@dataclass(frozen=True)
class ClassRow:
    """The figures of one class; None where undefined: no image of it, no prediction of it, or no mistake."""

    number: int
    name: str
    group: str  # many, medium or few
    train_images: int
    images: int
    top1: float | None
    top5: float | None
    precision: float | None
    recall: float | None
    mean_confidence: float | None
    confused_with: int | None
    confused_with_name: str | None
    confused_share: float | None  # of the class's images


@dataclass(frozen=True)
class Predictions:
    """Of each image [N]: the class given to it (of equal logits the lower number), confidence, is it in the top 5."""

    classes: NDArray[np.int64]
    confidence: NDArray[np.float64]
    in_top5: NDArray[np.bool_]


def predictions(outputs: Outputs) -> Predictions:
    classes, confidence, in_top5 = [], [], []
    for logits, labels in zip(outputs.logits.split(CHUNK), outputs.labels.split(CHUNK), strict=True):
        classes.append(logits.numpy().argmax(axis=1))
        confidence.append((logits.amax(dim=1).double() - logits.double().logsumexp(dim=1)).exp().numpy())
        own = logits.gather(1, labels[:, None])
        numbers = torch.arange(logits.shape[1])
        before = ((logits > own) | ((logits == own) & (numbers < labels[:, None]))).sum(dim=1)
        in_top5.append((before < TOP_K).numpy())
    return Predictions(np.concatenate(classes), np.concatenate(confidence), np.concatenate(in_top5))


def class_rows(outputs: Outputs) -> list[ClassRow]:
    """A row for each class, by number."""
    about, labels, found = outputs.about, outputs.labels.numpy(), predictions(outputs)
    num = len(about.class_names)
    grouped_by = about.class_counts if about.group_counts is None else about.group_counts
    groups = shot_groups(grouped_by, many_over=about.many_over, few_under=about.few_under)
    group_of = {int(c): name for name, classes in groups.items() for c in classes}
    images, given = np.bincount(labels, minlength=num), np.bincount(found.classes, minlength=num)
    right = np.bincount(labels[found.classes == labels], minlength=num)
    top5 = np.bincount(labels[found.in_top5], minlength=num)
    confidence = np.bincount(labels, weights=found.confidence, minlength=num)
    confused = _most_confused(labels, found.classes, num)
    rows = []
    for c, name in enumerate(about.class_names):
        other, times = confused.get(c, (None, 0))
        recall = _share(right[c], images[c])
        rows.append(
            ClassRow(
                number=c,
                name=name,
                group=group_of[c],
                train_images=about.class_counts[c],
                images=int(images[c]),
                top1=recall,
                top5=_share(top5[c], images[c]),
                precision=_share(right[c], given[c]),
                recall=recall,
                mean_confidence=_share(confidence[c], images[c]),
                confused_with=other,
                confused_with_name=None if other is None else about.class_names[other],
                confused_share=None if other is None else _share(times, images[c]),
            )
        )
    return rows


def write_csv(rows: Sequence[ClassRow], path: Path) -> None:
    """UTF-8, RFC 4180: names with commas, quotes or line ends are quoted; undefined values are empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow("class" if f.name == "number" else f.name for f in fields(ClassRow))
    for row in rows:
        writer.writerow(f"{v:.6f}" if isinstance(v, float) else v for v in asdict(row).values())
    write_atomic(path, text.getvalue().encode("utf-8", errors="backslashreplace"))


def _most_confused(labels: NDArray[np.int64], found: NDArray[np.int64], num: int) -> dict[int, tuple[int, int]]:
    """Class -> (the other class that most of its images are given to, how many); without a matrix of 8142 x 8142."""
    wrong = labels != found
    pairs, times = np.unique(labels[wrong] * num + found[wrong], return_counts=True)
    most: dict[int, tuple[int, int]] = {}
    for pair, count in zip(pairs.tolist(), times.tolist(), strict=True):  # ascending: of equal ones the first stays
        true, other = divmod(pair, num)
        if count > most.get(true, (0, 0))[1]:
            most[true] = other, count
    return most


def _share(part: float, whole: int) -> float | None:
    return float(part / whole) if whole else None
