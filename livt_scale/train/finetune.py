"""Stage 2 as a task of the loop: balanced fine-tuning of the pretrained encoder, evaluated on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale import optim
from livt_scale.checkpoint import store
from livt_scale.data.loader import Batch, apply_mix, normalise
from livt_scale.data.manifest import ShardSet
from livt_scale.errors import CheckpointMismatch, RunError
from livt_scale.losses import make_loss, soft_targets
from livt_scale.models.classifier import Classifier, build_classifier, load_encoder
from livt_scale.parallel.topology import World
from livt_scale.recipe import Finetune, Loss, Recipe
from livt_scale.train.evaluate import TrainingClasses, evaluate
from livt_scale.train.loop import Task
from livt_scale.train.rundir import is_done, read_status


def finetune_task(recipe: Recipe, train: ShardSet, *, run_dir: Path, world: World) -> Task:
    """The classifier of `recipe`, its encoder from RUN/pretrain or from the seed, and how it is trained."""
    part = recipe.stages.finetune
    assert part is not None
    model = initial_classifier(recipe, num_classes=train.num_classes, run_dir=run_dir)
    groups = optim.param_groups(
        model, weight_decay=part.weight_decay, layer_decay=part.layer_decay, depth=recipe.model.dims[1]
    )
    return Task(
        part,
        model,
        groups,
        _objective(recipe, part, train),
        evaluate=_evaluator(model, recipe, train, world) if recipe.data.val else None,
        evaluate_every_epochs=part.eval_every_epochs,
    )


def initial_classifier(recipe: Recipe, *, num_classes: int, run_dir: Path) -> Classifier:
    """The classifier before its first step."""
    part = recipe.stages.finetune
    assert part is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_classifier(recipe.model, num_classes=num_classes, drop_path=part.drop_path)
    if part.init == "pretrain":
        load_encoder(model, pretrained_state(run_dir))
    return model


def pretrained_state(run_dir: Path) -> dict[str, Tensor]:
    """The weights that pretraining in `run_dir` ended with, by name. Raises RunError where it has not ended."""
    if not is_done(run_dir, "pretrain"):
        status = read_status(run_dir, "pretrain") or {"state": "not started"}
        at = f" after step {status['step']} of {status['total_steps']}" if "step" in status else ""
        raise RunError(
            f"fine-tuning starts from pretraining, which is {status['state']}{at} in {run_dir}",
            remedy="run `livt train` without --stage, or set stages.finetune.init to scratch",
        )
    final = [c for c in store.list_checkpoints(run_dir / "pretrain" / "checkpoints") if c.final]
    if not final:
        raise RunError(
            f"pretraining in {run_dir} is done, but its final checkpoint is gone from pretrain/checkpoints",
            remedy="put it back, or remove pretrain/status.json to train again from the newest one left",
        )
    if not final[-1].whole:
        raise CheckpointMismatch(f"{final[-1].path}: {final[-1].why}", remedy="put the damaged file back")
    saved = store.read_tensors(final[-1].path, choose=lambda name: name.startswith("model."))
    return {name.removeprefix("model."): tensor for name, tensor in saved.items()}


def loss_options(loss: Loss) -> dict[str, float]:
    return {} if loss.tau is None else {"tau": loss.tau}


def _objective(recipe: Recipe, part: Finetune, train: ShardSet) -> Callable[..., Tensor]:
    criterion = make_loss(part.loss.name, train.class_counts, **loss_options(part.loss))

    def objective(call: Callable[..., Any], batch: Batch) -> Tensor:
        images = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
        targets = soft_targets(batch.labels, train.num_classes, part.smoothing)
        if batch.mix is not None:
            images, targets = apply_mix(images, targets, batch.mix)
        logits = call(images, batch.drop)
        return criterion(logits, targets)

    return objective


def _evaluator(
    model: Classifier, recipe: Recipe, train: ShardSet, world: World
) -> Callable[[], tuple[dict[str, float], float]]:
    assert recipe.data.val is not None
    val, classes = ShardSet.open(recipe.data.val), TrainingClasses.of(train)

    def run() -> tuple[dict[str, float], float]:
        top1 = evaluate(model, val, recipe, world=world, classes=classes)["top1"]
        return {f"top1_{group}": value for group, value in top1.items() if value is not None}, top1["all"]

    return run
