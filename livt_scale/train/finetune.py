"""Stage 2 as a task of the loop: balanced fine-tuning of the pretrained encoder, evaluated during training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from livt_scale import optim
from livt_scale.checkpoint import load
from livt_scale.config.load import from_saved
from livt_scale.config.recipe import Finetune, Recipe, digest
from livt_scale.config.stages import DOWNLOAD
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.loader import Batch, images_and_targets
from livt_scale.data.loader_processes import KeptBatches
from livt_scale.data.settings import TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.ema import WithEma
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.evaluation.calibration import temperature_report
from livt_scale.evaluation.evaluate import check_room, evaluate, kept_batches, weights_lineage
from livt_scale.evaluation.logits import About, gather
from livt_scale.models.classifier import AnyClassifier, Classifier, DistilledClassifier, build_classifier, load_encoder
from livt_scale.models.parameter_efficient import head_std, tune
from livt_scale.models.timm_backbone import TimmClassifier
from livt_scale.train.distill import Distillation, open_teacher
from livt_scale.train.head_init import start_from_class_means, start_from_vectors
from livt_scale.train.loop import Evaluation, Evaluator, StageTask
from livt_scale.train.run_dir import is_done, is_run
from livt_scale.train.run_files import read_status
from livt_scale.util.errors import DataError, RunError, UsageError, WeightsError
from livt_scale.weights.adapt import start_classifier
from livt_scale.weights.importer import open_weights
from livt_scale.weights.timm_weights import check_heads, start_from_file, start_from_hub, start_timm

_log = logging.getLogger(__name__)


def finetune_task(recipe: Recipe, train: ShardSet, *, run_dir: Path, world: World) -> StageTask:
    """The classifier of `recipe`, its encoder from RUN/pretrain or from the seed, and how it is trained."""
    part = recipe.stages.finetune
    assert part is not None
    model, origin = initial_classifier(recipe, num_classes=train.num_classes, run_dir=run_dir)
    if isinstance(model, TimmClassifier) and world.is_main:
        _log_timm(model)

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        decay = part.layer_decay if not recipe.model.is_resnet and not part.backbone_frozen else None
        return optim.param_groups(model, lr=part.peak_lr, weight_decay=part.weight_decay, layer_decay=decay)

    teaching = _teaching(recipe, part, train, model, device=world.device)
    val = ShardSet.open(recipe.data.val, data=recipe.data) if recipe.data.val else None
    images = kept_batches(val, recipe, world=world) if val else None
    return StageTask(
        part,
        model,
        groups,
        _objective(recipe, part, train, teaching),
        evaluate=_evaluator(recipe, train, val, world, images) if val and images else None,
        close=images.close if images else None,
        scored_on=val.digest if val else None,
        evaluate_every_epochs=part.eval_every_epochs,
        origin=origin,
        teacher=teaching.digest if teaching else None,
        average=part.ema,
        begin=partial(start_from_class_means, train=train, recipe=recipe, world=world)
        if part.head_init == "class_means"
        else None,
    )


def _log_timm(model: TimmClassifier) -> None:
    """What is special about a model of timm."""
    if model.facts.draws:
        _log.info("finetune: dropout draws its random numbers by rank: on another number of ranks it draws others")
    if not model.facts.blocks:
        _log.info("finetune: timm knows no blocks of the model: it is sharded as one unit, not compiled or recomputed")
    if model.facts.unused:
        names = ", ".join(model.facts.unused[:3])
        _log.info("finetune: %d parameters have no part in the logits and stay: %s", len(model.facts.unused), names)


def initial_classifier(
    recipe: Recipe, *, num_classes: int, run_dir: Path
) -> tuple[AnyClassifier, dict[str, Any] | None]:
    """The classifier before its first step, and the lineage of its encoder (None: from the seed)."""
    part = recipe.stages.finetune
    assert part is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build_classifier(
            recipe.model,
            num_classes=num_classes,
            drop_path=part.drop_path,
            head_std=head_std(part.train),
            head_norm=part.head_norm == "batch",
            cosine_scale=part.cosine_scale,
        )
    origin = _load_initial(model, recipe, run_dir=run_dir)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tune(model, part.train)  # now, since weights have the names of the plain network
    return model, origin


def _load_initial(model: AnyClassifier, recipe: Recipe, *, run_dir: Path) -> dict[str, Any] | None:
    """Load what the recipe begins from into `model`. Returns the lineage of these weights; None: from the seed."""
    part = recipe.stages.finetune
    assert part is not None
    if part.init == "scratch":
        return None
    lineage = _start_backbone(model, part, recipe, run_dir=run_dir)
    if part.head_file is not None:
        lineage = start_from_vectors(model, Path(part.head_file), lineage)
    return lineage


def _start_backbone(model: AnyClassifier, part: Finetune, recipe: Recipe, *, run_dir: Path) -> dict[str, Any]:
    """Load weights into `model`, in place: of RUN/pretrain, or those that the recipe names. Returns their lineage."""
    if isinstance(model, TimmClassifier):
        assert part.weights is not None, "the recipe has no pretraining of it"
        return _start_timm(model, part.weights, recipe, keep_head=part.keep_head)
    assert isinstance(model, Classifier), "the recipe has a ResNet begin from scratch"
    if part.init == "weights":
        assert part.weights is not None
        return _start_elsewhere(model, Path(part.weights), recipe, keep_head=part.keep_head)
    state, lineage, _ = read_pretraining(run_dir)
    load_encoder(model, state)
    return lineage


def _start_elsewhere(model: Classifier, path: Path, recipe: Recipe, *, keep_head: bool) -> dict[str, Any]:
    """Load foreign weights into `model`: an import, an export, a file or a run. Returns their lineage."""
    if is_run(path):
        state, lineage, theirs = _pretraining_without_head(path, keep_head=keep_head)
        if (heads := theirs.model.dims.heads) != recipe.model.dims.heads:
            raise WeightsError(
                f"{path} has {heads} heads, the model {recipe.model.dims.heads}", remedy="set model.heads"
            )
        start_classifier(model, state, recipe.model, keep_head=False)
        return lineage
    weights = open_weights(path)
    weights.check_heads(recipe.model)
    start_classifier(model, weights.state, recipe.model, keep_head=keep_head)
    return _lineage(weights.origin(), keep_head=keep_head)


def _start_timm(model: TimmClassifier, weights: str, recipe: Recipe, *, keep_head: bool) -> dict[str, Any]:
    """Load weights into timm's `model`: a file, an import, an export, a run or the hub. Returns their lineage."""
    if weights == DOWNLOAD:
        return _lineage(start_from_hub(model, recipe.model.timm_spec, keep_head=keep_head), keep_head=keep_head)
    path = Path(weights)
    if is_run(path):
        state, lineage, theirs = _pretraining_without_head(path, keep_head=keep_head)
        check_heads(model, theirs.model.dims.heads, where=weights)
        start_timm(model, state, keep_head=False, where=weights)
        return lineage
    return _lineage(start_from_file(model, path, keep_head=keep_head), keep_head=keep_head)


def _lineage(origin: dict[str, Any], *, keep_head: bool) -> dict[str, Any]:
    """The lineage of foreign weights; those with their head are others than those without."""
    head = {"recipe_digest": digest({"weights": origin["recipe_digest"], "head": True})}
    return {**origin, **head} if keep_head else origin


def _pretraining_without_head(path: Path, *, keep_head: bool) -> tuple[dict[str, Tensor], dict[str, Any], Recipe]:
    """`read_pretraining` of the run `path`. UsageError: a head is wanted."""
    if keep_head:
        raise UsageError(f"{path} is a run: its pretraining has no head", remedy="export it, and give the export")
    return read_pretraining(path)


def read_pretraining(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any], Recipe]:
    """(final weights of the masked autoencoder of `run_dir`, their lineage, its recipe). RunError: not finished."""
    path = final_pretraining(run_dir)
    saved = load.read_tensors(path, choose=lambda name: name.startswith("model."))  # every byte is checked
    manifest = load.read_manifest(path)
    facts, at = manifest.facts, manifest.position
    lineage = weights_lineage(facts, step=at.step, epoch=at.epoch, checkpoint=path.name)
    state = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
    return state, lineage, from_saved(facts.get("recipe"), where=path)


def final_pretraining(run_dir: Path) -> Path:
    """The final checkpoint of pretraining in `run_dir`. RunError: it has not finished, or the checkpoint is missing."""
    if not is_done(run_dir, "pretrain"):
        status = read_status(run_dir, "pretrain") or {"state": "not started"}
        at = f" after step {status['step']} of {status['total_steps']}" if "step" in status else ""
        raise RunError(
            f"fine-tuning starts from pretraining, which is {status['state']}{at} in {run_dir}",
            remedy="run `livt train` without --stage, or set stages.finetune.init to scratch",
        )
    folder = run_dir / "pretrain" / "checkpoints"
    final = [c.path for c in load.list_checkpoints(folder, quick=True) if c.final]
    if not final:
        raise RunError(
            f"pretraining in {run_dir} is done, but its final checkpoint is gone from {folder}",
            remedy="put it back, or remove pretrain/status.json to train again from the newest one left",
        )
    return final[-1]


def _teaching(
    recipe: Recipe, part: Finetune, train: ShardSet, model: AnyClassifier, *, device: torch.device
) -> Distillation | None:
    """The teacher of the recipe, if it has one; `model` then gives out the logits of both heads in training."""
    if part.distill is None:
        return None
    assert isinstance(model, DistilledClassifier), "the recipe has seen to it"
    model.set_distilled_training()
    teacher = open_teacher(recipe, train.manifest.class_names)
    return Distillation(recipe, teacher, counts=train.class_counts, device=device)


def _objective(recipe: Recipe, part: Finetune, train: ShardSet, teaching: Distillation | None) -> Callable[..., Tensor]:
    criterion = part.loss.criterion(train.class_counts)
    takes_numbers = TrainSettings.of_stage(recipe, "finetune").num_branches > 0

    def objective(call: Callable[..., Any], batch: Batch) -> Tensor:
        images, targets = images_and_targets(batch, part, recipe.data, num_classes=train.num_classes)
        assert (batch.drop is not None) == takes_numbers, "the coins of a run belong to its samples"
        if teaching is not None:
            answers = teaching.answers(images)
            return teaching.loss(call(images, batch.drop), targets, answers, epoch=batch.epoch)
        logits = call(images, batch.drop)
        return criterion(logits, targets)

    return objective


def _evaluator(recipe: Recipe, train: ShardSet, val: ShardSet, world: World, images: KeptBatches) -> Evaluator:
    classes = TrainingClasses.of(train, recipe.data)
    check_room(val, recipe.data, world=world, train=train)  # now, not after the first epoch
    if val.manifest_digest == train.manifest_digest and world.is_main:
        _log.warning("finetune: data.val has the images of data.train: accuracy on others is not measured")

    def measured(strategy: Strategy, *, final: bool) -> dict[str, Any]:
        """The report; of the final weights, on rank 0, with the temperature for exports and predictions."""
        kept: list[Tensor] | None = [] if final else None
        report = evaluate(strategy, val, recipe, world=world, classes=classes, keep=kept, batches=images)
        if kept is None:
            return report
        try:
            outputs = gather(kept, val, About.of(classes, recipe, report), world=world)
            return report if outputs is None else {**report, "temperature": temperature_report(outputs)}
        except (RunError, DataError) as error:  # a logit is not finite; a single image
            _log.warning("finetune: no temperature for exports and predictions: %s", error.message)
            return report

    def run(strategy: Strategy, *, final: bool) -> Evaluation:
        report = measured(strategy, final=final)
        top1 = report["top1"]
        values = {f"top1_{group}": value for group, value in top1.items() if value is not None}
        if isinstance(strategy, WithEma):
            with strategy.average_in_place():
                of_average = measured(strategy, final=final)
            own = ("top1", "top5", "calibration", "temperature")
            report["ema"] = {name: of_average[name] for name in own if name in of_average}
            values |= {f"ema_top1_{k}": value for k, value in of_average["top1"].items() if value is not None}
        return Evaluation(values, top1["all"], report)

    return run
