"""What a set holds and what a rank would see of it, without reading an image: manifest, index, the loader's order."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.data.order.class_balanced import ClassOrder, Repeated
from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.for_stage import stage_order, usable_labels
from livt_scale.data.order.instance import Ints, Order, SampleOrder
from livt_scale.data.shard_set import ShardSet
from livt_scale.longtail import imbalance_factor
from livt_scale.util.errors import UsageError


def info(folder: str | Path) -> dict[str, Any]:
    """What a set holds, as plain values for printing or JSON."""
    shards = ShardSet.open(folder)
    manifest, counts = shards.manifest, shards.class_counts
    lost = np.array(manifest.class_counts, dtype=np.int64) - counts
    factor = imbalance_factor(counts)
    return {
        "name": manifest.name,
        "samples": shards.num_samples,
        "quarantined": len(shards.quarantine),
        "bytes": sum(s.bytes for s in manifest.shards),
        "shards": len(manifest.shards),
        "image_types": manifest.image_types,
        "classes": shards.num_classes,
        "class_names": manifest.class_names,
        "class_counts": counts.tolist(),
        "quarantined_by_class": lost.tolist(),
        "largest_class": int(counts.max()),
        "smallest_class": int(counts.min()),
        "imbalance_factor": factor if np.isfinite(factor) else None,
        "seed": manifest.seed,
        "source": manifest.source,
    }


def rank_samples(
    recipe: Recipe, stage: Stage, *, rank: int, world_size: int, epoch: int, step: int | None = None
) -> dict[str, Any]:
    """{"steps": [{"step": s, "keys": [...]}, …]}: the rank's keys in slot order, for one epoch or one step of it.

    If a sample may occur more than once in an epoch, "views" counts its appearances from 0.
    """
    shards = ShardSet.open(recipe.data.train, data=recipe.data)
    order = stage_order(shards, recipe, stage)
    if epoch < 0 or not (step is None or 0 <= step < order.steps_per_epoch):
        raise UsageError(f"there is no step {step} of epoch {epoch}: an epoch has {order.steps_per_epoch} steps")
    ranks = RankOrder(shards, order, epochs=epoch + 1, rank=rank, world_size=world_size)  # all slots of a step
    batches = ranks.micro_batches(epoch=epoch, step=step or 0)
    if step is not None:
        batches = itertools.islice(batches, 1)
    once = isinstance(order, Order)
    steps = []
    for batch in batches:
        views = {} if once or batch.views is None else {"views": batch.views.tolist()}
        steps.append({"step": batch.step, "keys": shards.keys(batch.samples), **views})
    return {
        "stage": stage,
        "epoch": epoch,
        "rank": rank,
        "world_size": world_size,
        "steps_per_epoch": order.steps_per_epoch,
        "steps": steps,
    }


def class_report(shards: ShardSet, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """How often `stage` sees each class of `shards`, as plain values: in its first epoch, its last, and altogether."""
    part = recipe.stage(stage)
    order = stage_order(shards, recipe, stage)
    labels = usable_labels(shards)
    spans = {"first_epoch": range(1), "last_epoch": range(part.epochs - 1, part.epochs), "stage": range(part.epochs)}
    draws = {name: _padded(class_draws(order, labels, epochs), shards.num_classes) for name, epochs in spans.items()}
    return {
        "stage": stage,
        "sampling": part.sampling.model_dump(exclude_none=True),
        "repeats": part.repeats,
        "epochs": part.epochs,
        "steps_per_epoch": order.steps_per_epoch,
        "draws_per_epoch": order.steps_per_epoch * order.global_batch,
        "classes": [
            {
                "class": name,
                "images": int(shards.class_counts[c]),
                **{span: int(counts[c]) for span, counts in draws.items()},
            }
            for c, name in enumerate(shards.manifest.class_names)
        ],
    }


def class_draws(order: SampleOrder, labels: Ints, epochs: range) -> Ints:
    """[C] How often each class is drawn in `epochs`, a run of them; `labels`: [N] the class of each position."""
    if isinstance(order, Repeated):
        return _of_repeated(order, labels, epochs) * order.views
    if isinstance(order, ClassOrder):
        return order.class_counts(epochs)
    assert isinstance(order, Order)
    return sum((_of_epoch(order, labels, e) for e in epochs), start=_none(labels))


def _of_repeated(order: Repeated, labels: Ints, epochs: range) -> Ints:
    """Samples, not views: complete passes by arithmetic, the epochs of an incomplete pass step by step."""
    base, each = order.base, order.epochs_a_pass
    if not isinstance(base, Order):
        return class_draws(base, labels, epochs)
    draws = _none(labels)
    for turn in sorted({e // each for e in epochs}):
        inside = [e % each for e in epochs if e // each == turn]
        if len(inside) == each:
            draws += _of_epoch(base, labels, turn)
            draws -= _of_steps(base, labels, turn, range(each * order.steps_per_epoch, base.steps_per_epoch))
        else:
            first = inside[0] * order.steps_per_epoch
            draws += _of_steps(base, labels, turn, range(first, first + len(inside) * order.steps_per_epoch))
    return draws


def _of_epoch(order: Order, labels: Ints, epoch: int) -> Ints:
    size = int(labels.max()) + 1
    return np.bincount(labels, minlength=size) - np.bincount(labels[order.left_out(epoch)], minlength=size)


def _of_steps(order: Order, labels: Ints, epoch: int, steps: range) -> Ints:
    draws = _none(labels)
    for step in steps:
        draws += np.bincount(labels[order.positions(epoch, step)], minlength=draws.size)
    return draws


def _none(labels: Ints) -> Ints:
    return np.zeros(int(labels.max()) + 1, dtype=np.int64)


def _padded(counts: Ints, num_classes: int) -> Ints:
    return np.pad(counts, (0, num_classes - counts.size))  # the last classes may have no image
