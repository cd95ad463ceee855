"""k-nearest-neighbour classification of cached features: a measure of a frozen backbone that trains nothing.

For each image the k training images with the largest cosine similarity s vote for their classes with weight
exp(s / T), as DINO evaluates (k = 20, T = 0.07). The class with the largest sum wins; of equal ones, the one with the
lower number. On a long-tailed training set a frequent class has more candidates, so few-shot accuracy is low by
construction: compare backbones with it, not classifiers.

Source: Wu et al., arXiv 1805.01978, section 3.4; DINO, arXiv 2104.14294, appendix F.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from livt_scale.metrics import Tally
from livt_scale.posthoc.feature_set import FeatureSet, check_comparable
from livt_scale.util.errors import UsageError

K, TEMPERATURE = 20, 0.07
MAX_SIMILARITIES = 2**26  # computed together: 256 MB


def votes(
    train: Tensor, labels: Tensor, queries: Tensor, *, num_classes: int, k: int = K, temperature: float = TEMPERATURE
) -> Tensor:
    """Share of the votes for each class, float64 [M, C]; train float32 [N, D] with labels [N], queries [M, D]."""
    candidates = F.normalize(train, dim=1)
    shares = []
    for part in F.normalize(queries, dim=1).split(max(1, MAX_SIMILARITIES // len(train))):
        nearest = (part @ candidates.T).topk(k, dim=1)
        weights = (nearest.values.double() / temperature).softmax(dim=1)  # [m, k]
        counted = weights.new_zeros(len(part), num_classes)
        shares.append(counted.scatter_add_(1, labels[nearest.indices], weights))
    return torch.cat(shares)


def knn_report(
    train: FeatureSet, evaluated: FeatureSet, *, k: int = K, temperature: float = TEMPERATURE
) -> dict[str, Any]:
    """Accuracy on `evaluated` by the neighbours in `train`, as `livt eval` reports it. UsageError, DataError."""
    check_comparable(train, evaluated)
    if not 1 <= k <= len(train.labels):
        raise UsageError(f"k is {k}, and {train.where} has {len(train.labels)} images", remedy="give a smaller --k")
    if not temperature > 0:
        raise UsageError(f"the temperature is {temperature:g}", remedy="give a number above 0")
    num_classes = len(train.facts.class_names)
    shares = votes(
        train.features, train.labels, evaluated.features, num_classes=num_classes, k=k, temperature=temperature
    )
    how = {"method": "knn", "k": k, "temperature": temperature}
    return report_of(shares.log(), train, evaluated) | how


def report_of(logits: Tensor, train: FeatureSet, evaluated: FeatureSet) -> dict[str, Any]:
    """The report of logits float [M, C] for `evaluated`; classes are grouped by the training set."""
    facts = train.facts
    tally = Tally(len(facts.class_names))
    tally.update(logits, evaluated.labels)
    counts = torch.bincount(train.labels, minlength=len(facts.class_names)).numpy()
    report = tally.report(counts, many_over=facts.many_over, few_under=facts.few_under, group_counts=facts.group_counts)
    return {**report, "weights": facts.weights, "train": facts.data, "data": evaluated.facts.data}
