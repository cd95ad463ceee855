"""A run from its recipe to its results: stage after stage, each taken up where it stopped, none done twice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from livt_scale.checkpoint.manager import Tiers
from livt_scale.checkpoint.manifest import step_name
from livt_scale.config.recipe import Parallel, Recipe, Stage
from livt_scale.data.loader import Batch, train_batches
from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed import cpu_cores
from livt_scale.distributed.batchnorm import statistics_of
from livt_scale.distributed.ema import with_average
from livt_scale.distributed.strategy import make_strategy
from livt_scale.distributed.world import World, detect, process_group
from livt_scale.evaluation import evaluate as evaluation
from livt_scale.evaluation import plots
from livt_scale.train import run_dir as rundir
from livt_scale.train.anomalies import Anomalies
from livt_scale.train.batch_plan import BatchPlan, plan_batches
from livt_scale.train.finetune import finetune_task
from livt_scale.train.loop import Guard, Schedule, Task, fit
from livt_scale.train.preempt import Preemption, time_limit
from livt_scale.train.pretrain import pretrain_task
from livt_scale.train.resume_rules import check_allowable
from livt_scale.train.telemetry.layer_stats import LayerGroups
from livt_scale.train.telemetry.metrics_log import Telemetry, last_step_written, measured_demand
from livt_scale.train.telemetry.mfu import speed_of
from livt_scale.train.telemetry.trackers import Trackers, check_installed, open_trackers
from livt_scale.train.train_state import TrainState, run_facts
from livt_scale.train.watchdog import Watchdog
from livt_scale.util.errors import CheckpointMismatch, DataError, UsageError


def train(recipe: Recipe, *, stage: Stage | None = None, allow: Sequence[str] = ()) -> None:
    """Run `recipe`, or one of its stages, to the end: under nothing, torchrun or srun alike.

    Continues by itself from what the run directory holds. allow: fields of the recipe that may have changed in
    mid-stage (`train.allowed`). Raises LivtError: Preempted where a signal stopped it.
    """
    allowed = check_allowable(allow)
    if stage is not None and stage not in recipe.stage_names:
        raise UsageError(f"the recipe has no stage {stage}", remedy=f"it has {', '.join(recipe.stage_names)}")
    world = detect()
    for name in recipe.stage_names:
        _plan(recipe, name, world)  # what cannot be divided is said before anything is allocated
    _set_up_torch(recipe.parallel)
    with process_group(world, timeout_s=recipe.parallel.timeout_s):
        train_together(recipe, (stage,) if stage else recipe.stage_names, world=world, allow=allowed)


def train_together(recipe: Recipe, stages: Iterable[Stage], *, world: World, allow: tuple[str, ...] = ()) -> None:
    """`train` in a process group that is up already: all ranks of `world` call it."""
    run_dir = run_dir_of(recipe)
    limit = world.peers.on_rank0(time_limit)
    with (
        cpu_cores.told_to_loader(world),
        _alone(run_dir, world),
        Preemption(limit if world.is_main else None) as preemption,
    ):
        world.peers.on_rank0(lambda: check_installed(recipe.log))
        world.peers.on_rank0(lambda: rundir.save_resolved(recipe, run_dir))
        for name in stages:
            if world.peers.on_rank0(lambda name=name: rundir.is_done(run_dir, name)):  # type: ignore[misc]
                _say(world, f"{name} is done already in {run_dir}")
            else:
                plan = _plan(recipe, name, world)
                _train_stage(recipe.at(name), name, preemption, run_dir=run_dir, world=world, plan=plan, allow=allow)


def _set_up_torch(parallel: Parallel) -> None:
    if parallel.threads is not None:
        torch.set_num_threads(parallel.threads)
    if parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


def run_dir_of(recipe: Recipe) -> Path:
    return Path(recipe.run_dir or Path("runs") / recipe.name)


def open_alike(recipe: Recipe, *, world: World) -> ShardSet:
    """The training set, the same on every rank: what goes wrong on one of them is raised on all.

    Raises DataError where a rank reads another manifest or quarantine than rank 0: it would train on other samples.
    """
    train_set = world.peers.run_all(lambda: ShardSet.open(recipe.data.train, data=recipe.data))
    digest = train_set.digest
    error: DataError | None = None
    if digest != world.peers.on_rank0(lambda: digest):
        error = DataError(
            f"rank {world.rank} reads another manifest or quarantine in {recipe.data.train} than rank 0",
            remedy="start again when the set is the same for all nodes",
        )
    world.peers.all_or_none(error)
    return train_set


def _train_stage(
    recipe: Recipe,
    stage: Stage,
    preemption: Preemption,
    *,
    run_dir: Path,
    world: World,
    plan: BatchPlan,
    allow: tuple[str, ...],
) -> None:
    folder = run_dir / stage
    status = rundir.Status(folder, stage=stage, writes=world.is_main)
    watchdog = Watchdog(folder, status, world=world, faults=recipe.faults, timeout_s=recipe.parallel.timeout_s)
    with status.told(), watchdog, watchdog.errors_told():
        train_set = open_alike(recipe, world=world)
        order = stage_order(train_set, recipe, stage)
        task = _make_task(recipe, stage, train_set, run_dir=run_dir, world=world)
        schedule = Schedule(
            task.part.epochs, order.steps_per_epoch, recipe.checkpoint, evaluate_every_epochs=task.evaluate_every_epochs
        )
        betas, momentum = task.part.betas, task.part.lars_momentum
        strategy = make_strategy(recipe.parallel, task.model, task.groups, betas=betas, momentum=momentum, world=world)
        strategy = with_average(strategy, task.average)
        facts = run_facts(recipe, stage, train_set, strategy=strategy.name, origin=task.origin)
        state = TrainState(strategy, facts, anomalies=Anomalies(recipe.faults), allow=allow)
        with (
            Tiers(folder / "checkpoints", saving=recipe.checkpoint, world=world.peers) as saver,
            watchdog.errors_told(),
        ):
            resumed = state.resume(saver)
            if state.step > schedule.total:  # only where --allow has made the stage shorter
                raise CheckpointMismatch(f"{resumed}: the stage would end at step {schedule.total}, before it")
            status.write("running", step=state.step, total_steps=schedule.total)
            _announce(stage, task, plan, strategy.name, world, resumed)
            with _telemetry(recipe, stage, folder, schedule, state, train_set, world) as telemetry:
                batches = _batches(recipe, stage, train_set, plan, schedule, state, world)
                ended = fit(
                    task, batches, state=state, schedule=schedule, plan=plan, saver=saver,
                    telemetry=telemetry, status=status, guard=Guard(preemption, watchdog, recipe.faults), world=world,
                    folder=folder,
                )  # fmt: skip
        if task.evaluate is not None:
            watchdog.at("evaluation", state.step)
            ended = ended or task.evaluate(strategy)  # a run that was killed between its last checkpoint and here
            if world.is_main:
                _write_evaluation(ended.report, train_set, folder, facts, schedule)
        status.write("done", step=state.step, total_steps=schedule.total)


def _make_task(recipe: Recipe, stage: Stage, train_set: ShardSet, *, run_dir: Path, world: World) -> Task:
    if stage == "pretrain":
        return world.peers.run_all(lambda: pretrain_task(recipe, train_set, world=world))
    return world.peers.run_all(lambda: finetune_task(recipe, train_set, run_dir=run_dir, world=world))


def _batches(
    recipe: Recipe,
    stage: Stage,
    train_set: ShardSet,
    plan: BatchPlan,
    schedule: Schedule,
    state: TrainState,
    world: World,
) -> Iterator[Batch]:
    epoch, step = divmod(state.step, schedule.steps_per_epoch)
    batches = train_batches(
        train_set,
        recipe,
        stage=stage,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=plan.micro_batch,
        epoch=epoch,
        step=step,
        local_ranks=world.local_size,
        demand=measured_demand(run_dir_of(recipe) / stage),
    )
    _say(world, f"{stage}: {batches.loading}")
    return iter(batches)


def _write_evaluation(
    report: dict[str, Any], train_set: ShardSet, folder: Path, facts: dict[str, Any], schedule: Schedule
) -> None:
    end = schedule.position(schedule.total)
    weights = evaluation.weights_lineage(facts, step=end.step, epoch=end.epoch, checkpoint=step_name(end.step))
    evaluation.write_eval(report, folder / "eval.json", weights=weights)
    plots.confusion(report, train_set.manifest.class_names, folder / "samples" / "confusion.png")


def _telemetry(
    recipe: Recipe,
    stage: Stage,
    folder: Path,
    schedule: Schedule,
    state: TrainState,
    train_set: ShardSet,
    world: World,
) -> Telemetry:
    log = recipe.log
    speed = speed_of(recipe, stage, num_classes=train_set.num_classes, device=world.device, world_size=world.world_size)
    return Telemetry(
        folder,
        label=stage,
        every_steps=log.every_steps,
        total_steps=schedule.total,
        steps_per_epoch=schedule.steps_per_epoch,
        global_batch=recipe.stage(stage).global_batch,
        world_size=world.world_size,
        start_step=state.step,
        sums=state.sums,
        writes=world.is_main,
        speed=speed,
        trackers=world.peers.run_all(lambda: _trackers(recipe, stage, folder, state, world)),
        device=world.device,
        profile_steps=log.profile_steps if world.is_main or log.profile_ranks == "all" else None,
        rank=world.rank,
        layers=LayerGroups(state.strategy.model) if log.layer_groups else None,
    )


def _trackers(recipe: Recipe, stage: Stage, folder: Path, state: TrainState, world: World) -> Trackers | None:
    if not world.is_main:
        return None
    return open_trackers(
        recipe, stage, run_dir=folder.parent, start_step=state.step, sent_to=last_step_written(folder),
        say=lambda text: _say(world, f"{stage}: {text}"),
    )  # fmt: skip


def _plan(recipe: Recipe, stage: Stage, world: World) -> BatchPlan:
    part = recipe.stage(stage)
    pairs = stage == "finetune" and recipe.stages.finetune is not None and recipe.stages.finetune.mixes
    return plan_batches(part.global_batch, part.micro_batch, world_size=world.world_size, pairs=pairs)


def _announce(stage: Stage, task: Task, plan: BatchPlan, strategy: str, world: World, resumed: str | None) -> None:
    part = task.part
    weights = sum(getattr(p, "ds_numel", p.numel()) for p in task.model.parameters())  # DeepSpeed leaves 0 in place
    frozen = ", the head alone trained" if part.backbone_frozen else ""
    _say(world, f"{stage}: {weights / 1e6:.1f} M weights{frozen}, {strategy}, {plan}")
    _say(world, f"{stage}: peak lr {part.peak_lr:.3g} = {part.base_lr:.3g} · {part.global_batch} / 256")
    if world.world_size > 1 and statistics_of(task.model):
        _say(world, f"{stage}: batch norm sees a rank's micro-batch, so the result depends on the number of ranks")
    if resumed:
        _say(world, f"{stage}: goes on from {resumed}")


def _say(world: World, text: str) -> None:
    if world.is_main:
        print(text, file=sys.stderr, flush=True)


class _alone:
    """The run's lock, taken by rank 0 for all; where it is refused, every rank raises the same error."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._lock, self._world = rundir.hold(run_dir), world

    def __enter__(self) -> None:
        self._world.peers.on_rank0(self._lock.__enter__)

    def __exit__(self, *error: Any) -> None:
        if self._world.is_main:
            self._lock.__exit__(*error)
