"""Evaluation: accuracy by group, per class, calibration and confusion, each sample counted exactly once.

    rank 0 of 2   samples 0 2 4 6 8        counts ─┐
    rank 1 of 2   samples 1 3 5 7          counts ─┴─ sum ─► top1 = right / 9

Ranks may hold different numbers of batches. No sample is counted twice, and no rank waits for another inside the loop,
unless the model is sharded: then a rank that has no batch left calls it on nothing that counts, because the others need
its shard of the weights. A compiled model gets batches of one size, filled up with zeros that do not count. The counts
are summed once at the end. So the score does not depend on the world size (as with a padding sampler, or with means of
batch means, it would). The sum must give the set's number of samples, or it is an error.

Groups come from the counts of the *training* set, or those that data.group_counts names; the classes of both sets must
be the same, in the same order. The report says which data and which weights it is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from livt_scale.config.recipe import Data, Recipe
from livt_scale.data.classes import TrainingClasses, check_same_classes
from livt_scale.data.loader import Batches, evaluation_batches
from livt_scale.data.loader_processes import KeptBatches
from livt_scale.data.num_workers import max_workers
from livt_scale.data.order.instance import eval_positions
from livt_scale.data.remote.prefetch import check_evaluation_room
from livt_scale.data.settings import ImageSettings
from livt_scale.data.shard_set import SetFacts, ShardSet
from livt_scale.distributed import precision as precisions
from livt_scale.distributed.blocks import is_compiled
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.evaluation.tta import Views
from livt_scale.metrics import Tally
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import RunError, UsageError

FORMAT = "livt-eval"
VERSION = 1
BATCH = 64  # the same everywhere, so that a run, its log and its export agree to the last digit


def evaluate(
    model: nn.Module | Strategy,
    shards: ShardSet,
    recipe: Recipe,
    *,
    world: World,
    classes: TrainingClasses | None = None,
    batch: int = BATCH,
    views: Views = Views(),  # noqa: B008 - frozen
    keep: list[Tensor] | None = None,
    batches: KeptBatches | None = None,
) -> dict[str, Any]:
    """The report of `model` (a Classifier on `world.device`, or a strategy that holds one) on `shards`, on every rank.

    classes: None: those of the recipe's training set. batch: images a forward pass, which sees one view of each. keep:
    gets this rank's logits, float [B, C] on the CPU, in the order of the set (`train.outputs`). batches: of
    `kept_batches`, where the set is evaluated again. The model is left in the mode it was in. Raises DataError where
    the classes differ, and on every rank what goes wrong on one.
    """
    data = recipe.data
    return evaluate_images(
        model, shards, ImageSettings.of_recipe(recipe), precision=recipe.parallel.precision, device=world.device,
        world=world, classes=classes or TrainingClasses.of(SetFacts.read(data.train, data=data), data),
        batch=batch, views=views, keep=keep, batches=batches,
    )  # fmt: skip


def kept_batches(shards: ShardSet, recipe: Recipe, *, world: World) -> KeptBatches:
    """For `evaluate` of several weights on `shards`: its loader processes are started once. The caller closes it."""
    settings = ImageSettings.of_recipe(recipe)
    return KeptBatches(lambda: evaluation_batches(shards, settings, **world.for_loader, batch=BATCH, kept=True))


def evaluate_images(
    model: nn.Module | Strategy,
    shards: ShardSet,
    settings: ImageSettings,
    *,
    precision: str,
    device: torch.device,
    world: World,
    classes: TrainingClasses,
    batch: int = BATCH,
    views: Views = Views(),  # noqa: B008 - frozen
    keep: list[Tensor] | None = None,
    batches: KeptBatches | None = None,
    in_step: bool = False,
) -> dict[str, Any]:
    """As `evaluate`, for settings of any origin. `precision`, "fp32" or "bf16", is of a plain model on `device`.

    in_step: all ranks call the model as often as the one with the most batches, since it may be a wrapped one whose
    ranks wait for each other.
    """
    check_same_classes(shards, classes)
    tally = Tally(shards.num_classes, device=device)

    def count(logits: Tensor, labels: Tensor) -> None:
        tally.update(logits, labels)
        if keep is not None:
            keep.append(logits.float().cpu())

    each_batch(
        model, shards, settings, count, precision=precision, device=device, world=world, batch=batch, views=views,
        batches=batches, in_step=in_step,
    )  # fmt: skip
    if world.world_size > 1:
        for sums in tally.tensors():
            dist.all_reduce(sums)
    groups = {"many_over": settings.data.many_over, "few_under": settings.data.few_under}
    report = tally.report(classes.counts, **groups, group_counts=classes.group_counts)
    if report["num_samples"] != shards.num_samples:
        raise RunError(f"{shards.where}: {report['num_samples']} samples counted of {shards.num_samples}")
    facts = {"precision": precision, "views": views.facts(), "data": data_lineage(shards)}
    return {**report, **facts}


def each_batch(
    model: nn.Module | Strategy,
    shards: ShardSet,
    settings: ImageSettings,
    take: Callable[[Tensor, Tensor], None],
    *,
    precision: str,
    device: torch.device,
    world: World,
    batch: int = BATCH,
    views: Views = Views(),  # noqa: B008 - frozen
    batches: KeptBatches | None = None,
    in_step: bool = False,
) -> None:
    """Call `take(logits, labels)`, [B, C] and [B] on `device`, for each of this rank's batches, each image once.

    A collective call. Arguments as `evaluate_images`; raises on every rank what goes wrong on one.
    """
    settings = views.settings(settings)
    world.peers.run_all(lambda: check_room(shards, settings.data, world=world, batch=batch))
    infer, owed = _plain(model, device, precision) if isinstance(model, nn.Module) else model.infer, 0
    if (in_step and world.world_size > 1) if isinstance(model, nn.Module) else model.lockstep:
        owed = _most_batches(shards, world, batch) * views.number  # forward passes, at least

    filled = batch if is_compiled(model if isinstance(model, nn.Module) else model.model) else 1

    def counted(images: Tensor) -> Tensor:
        nonlocal owed
        logits = infer(_filled(images, filled))
        owed -= 1
        logits = logits[: len(images)] if isinstance(logits, Tensor) else logits
        _check_logits(logits, (len(images), shards.num_classes))
        return logits

    once = partial(evaluation_batches, shards, settings, **world.for_loader, batch=batch, crops=views.crops)
    one_pass = once if batches is None else batches.one_pass
    error: Exception | None = None
    try:
        for logits, labels in _answers(counted, one_pass, settings.data, device=device, views=views):
            take(logits, labels)
    except Exception as raised:
        error = raised
    for _ in range(owed):  # after an error too: the others count to the end
        infer(torch.zeros(filled, settings.channels, *[settings.image_px] * 2, device=device))
    world.peers.all_or_none(error)


def _filled(images: Tensor, count: int) -> Tensor:
    """`images`, followed by zeros where they are fewer than `count`."""
    missing = count - len(images)
    return torch.cat([images, images.new_zeros(missing, *images.shape[1:])]) if missing > 0 else images


def _check_logits(logits: Any, shape: tuple[int, int]) -> None:
    if not isinstance(logits, Tensor) or logits.shape != shape:
        found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UsageError(
            f"the model returns {found}, and logits of this set are {list(shape)}",
            remedy="evaluate a classifier of these classes",
        )


def check_room(
    shards: ShardSet, data: Data, *, world: World, batch: int = BATCH, train: ShardSet | None = None
) -> None:
    """Raise DataError where `data.cache.limit_gib` is too small to evaluate on `shards`, with `train` open too."""
    workers = max_workers(data, local_ranks=world.local_size)
    check_evaluation_room(shards, batch=batch, ranks=world.local_size, workers=workers, train=train)


def data_lineage(shards: ShardSet) -> dict[str, Any]:
    """Which data: name, folder, and the digest of its manifest (and quarantine), which changes with any of them."""
    return {
        "name": shards.manifest.name,
        "folder": shards.where,
        "manifest_digest": shards.digest,
        "num_samples": shards.num_samples,
    }


def weights_lineage(facts: dict[str, Any], *, step: int, epoch: int, checkpoint: str) -> dict[str, Any]:
    """Which weights: of which run, the checkpoint's name, its position, what it learnt from, and how it began.

    `facts` are those of the checkpoint (`train.train_state.run_facts`). left_out: only where the training set had a
    quarantine.
    """
    left_out = facts.get("data", {}).get("left_out", {})
    return {
        "run": facts.get("run", facts["recipe_digest"]),
        "stage": facts["stage"],
        "checkpoint": checkpoint,
        "position": {"epoch": epoch, "step": step},
        "recipe_digest": facts["recipe_digest"],
        "trained_on": facts["learnt_from"].get("data.manifest"),
        "init": facts.get("init"),
        **({"scored_on": facts["scored_on"]} if facts.get("scored_on") else {}),
        **({"left_out": left_out} if left_out.get("count") else {}),
    }


def write_eval(report: dict[str, Any], path: Path, *, weights: dict[str, Any]) -> None:
    """Write `report` of `evaluate` as eval.json, atomically; `weights`: what was evaluated, and its origin."""
    write_atomic(path, eval_json(report, weights=weights))


def eval_json(report: dict[str, Any], *, weights: dict[str, Any]) -> bytes:
    """The contents of eval.json: one spelling, no NaN, a long list on one line."""
    body = {"format": FORMAT, "version": VERSION, **report, "weights": weights}
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in body.items()]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _answers(
    infer: Callable[[Tensor], Tensor],
    one_pass: Callable[[], AbstractContextManager[Batches]],
    data: Data,
    *,
    device: torch.device,
    views: Views,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of this rank's batches."""
    with one_pass() as batches:
        for own in batches:
            on_device = own.to(device)
            yield views.logits(infer, on_device.images, data), on_device.labels


def _most_batches(shards: ShardSet, world: World, batch: int) -> int:
    """Of the rank that has the most."""
    sizes = (
        len(eval_positions(shards.num_samples, rank=r, world_size=world.world_size)) for r in range(world.world_size)
    )
    return -(-max(sizes) // batch)


def _plain(model: nn.Module, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
    def infer(images: Tensor) -> Tensor:
        with torch.no_grad():  # not inference_mode: a wrapped model may reuse memory in training
            logits: Tensor = precisions.infer(model, device, precision, images)
        return logits

    return infer
