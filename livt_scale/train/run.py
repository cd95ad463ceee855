"""A run from its recipe to its results: stage after stage, each resumed where it stopped, finished ones skipped."""

from __future__ import annotations

import faulthandler
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from livt_scale import optim
from livt_scale.checkpoint.manager import Tiers
from livt_scale.checkpoint.manifest import read_manifest, step_name
from livt_scale.config.recipe import Parallel, Recipe, Stage
from livt_scale.config.run_place import absolute_run_dir
from livt_scale.data.loader import Batch, train_batches
from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed import cpu_cores
from livt_scale.distributed.batchnorm import running_statistics
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World, detect, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.evaluation import evaluate as evaluation
from livt_scale.evaluation import plots
from livt_scale.train import heartbeat
from livt_scale.train import run_dir as rundir
from livt_scale.train.anomalies import Anomalies
from livt_scale.train.anomaly_policy import AnomalyPolicy
from livt_scale.train.batch_plan import BatchPlan, stage_batches
from livt_scale.train.compare_run import check_start
from livt_scale.train.finetune import finetune_task
from livt_scale.train.garbage import GarbageCollection
from livt_scale.train.hooks import Evaluate, Pictures, Save, StopOnRequest
from livt_scale.train.load_trained import has_final, train_on
from livt_scale.train.loop import Hook, Loop, StageTask
from livt_scale.train.preempt import Preemption, time_limit
from livt_scale.train.preflight import check_run, refuse
from livt_scale.train.pretrain import pretrain_task
from livt_scale.train.replica_check import ReplicaCheck
from livt_scale.train.resume_rules import check_allowable
from livt_scale.train.run_files import LOG
from livt_scale.train.schedule import Schedule
from livt_scale.train.telemetry.layer_stats import LayerStats
from livt_scale.train.telemetry.metrics_log import MetricsLog, last_step_written, measured_demand
from livt_scale.train.telemetry.mfu import speed_of
from livt_scale.train.telemetry.profiler import Profiler
from livt_scale.train.telemetry.rank_times import RankTimes
from livt_scale.train.telemetry.tensorboard import TensorBoard
from livt_scale.train.telemetry.trackers import Trackers, check_installed, open_trackers
from livt_scale.train.train_state import TrainState, run_facts
from livt_scale.train.watchdog import Watchdog
from livt_scale.util.errors import CheckpointMismatch, DataError, LivtError, UsageError
from livt_scale.util.log import to_file

_log = logging.getLogger(__name__)
START_GRACE_S = 60  # after the bound of collectives, whose error is the better one


def train(recipe: Recipe, *, stage: Stage | None = None, allow: Sequence[str] = (), hooks: Sequence[Hook] = ()) -> None:
    """Run `recipe`, or one of its stages, to the end: as a single process, under torchrun or under srun.

    Resumes from what the run directory holds. allow: fields of the recipe that may have changed in mid-stage
    (`train.resume_rules`). hooks: called after the built-in ones, in every stage (`train.hooks`). Raises LivtError:
    Preempted if a signal stopped it.
    """
    allowed = check_allowable(allow)
    if stage is not None and stage not in recipe.stage_names:
        raise UsageError(f"the recipe has no stage {stage}", remedy=f"it has {', '.join(recipe.stage_names)}")
    world = detect()
    _set_up_torch(recipe.parallel, world.device)
    stages = (stage,) if stage else recipe.stage_names
    timeout_s = recipe.parallel.timeout_s
    loads = recipe.data.workers != 0
    with process_group(world, timeout_s=timeout_s, loads=loads), _bounded_start(world, timeout_s=timeout_s):
        train_together(recipe, stages, world=world, allow=allowed, hooks=hooks)


@contextmanager
def _bounded_start(world: World, *, timeout_s: int) -> Iterator[None]:
    """End a process that does not reach its first watchdog, which then sets this timer: gloo's lazy connections wait
    for a rank that is gone without a bound (`distributed/process_setup.py`)."""
    if world.world_size > 1:
        faulthandler.dump_traceback_later(timeout_s + START_GRACE_S, exit=True)
    try:
        yield
    finally:
        if world.world_size > 1:
            faulthandler.cancel_dump_traceback_later()


def train_together(
    recipe: Recipe, stages: Iterable[Stage], *, world: World, allow: tuple[str, ...] = (), hooks: Sequence[Hook] = ()
) -> None:
    """`train` in an existing process group: all ranks of `world` call it."""
    run_dir = run_dir_of(recipe)
    # A command that is refused, or has nothing to do, changes nothing: not even the lock is taken for it.
    left = _left_to_train(recipe, stages, run_dir, world=world, allow=allow)
    if not left:
        return
    sizes = dict.fromkeys(left, world.world_size)
    world.peers.on_rank0(lambda: refuse(check_run(recipe, stages=left, world_sizes=sizes)))
    world.peers.on_rank0(lambda: check_installed(recipe.log))
    _log.info("run directory: %s", run_dir)
    limit = world.peers.on_rank0(time_limit)
    with (
        cpu_cores.share_with_loader(world),
        _alone(run_dir, world),
        Preemption(limit if world.is_main else None) as preemption,
    ):
        world.peers.on_rank0(lambda: rundir.save_first(recipe, run_dir))
        with to_file(run_dir / LOG) if world.is_main else nullcontext():
            for name in _left_to_train(recipe, left, run_dir, world=world, allow=allow):
                _StageRun(recipe, name, run_dir, world, preemption, allow, hooks).run()


def _left_to_train(
    recipe: Recipe, stages: Iterable[Stage], run_dir: Path, *, world: World, allow: tuple[str, ...]
) -> list[Stage]:
    """Those of `stages` that are not finished. Raises what `check_start` raises, on every rank."""

    def check() -> tuple[Stage, ...]:
        try:
            return check_start(recipe, run_dir, allow=allow)
        except LivtError:
            rundir.check_free(run_dir)  # that another process trains there is the better reason
            raise

    stages = tuple(stages)
    unfinished = world.peers.on_rank0(check)
    for name in stages:
        if name not in unfinished:
            _log.info("%s is done already in %s", name, run_dir)
            if world.is_main and not has_final(run_dir, name):
                _log.warning("its final checkpoint is gone or damaged: %s", train_on(run_dir, name))
    return [name for name in stages if name in unfinished]


def _set_up_torch(parallel: Parallel, device: torch.device) -> None:
    if device.type == "cuda" and parallel.precision != "fp32":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that autocast leaves in fp32
    if parallel.threads is not None:
        torch.set_num_threads(parallel.threads)
    if parallel.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
        # for finding faults: it writes to each new tensor
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def run_dir_of(recipe: Recipe) -> Path:
    return absolute_run_dir(recipe.run_dir, name=recipe.name)


def open_alike(recipe: Recipe, *, world: World) -> ShardSet:
    """The training set, the same on every rank. An error on one rank is raised on all.

    Raises DataError if a rank reads another manifest or quarantine than rank 0: it would train on other samples.
    """
    train_set = world.peers.run_all(lambda: ShardSet.open(recipe.data.train, data=recipe.data))
    digest = train_set.digest
    error: DataError | None = None
    if digest != world.peers.on_rank0(lambda: digest):
        error = DataError(
            f"rank {world.rank} reads another manifest or quarantine in {recipe.data.train} than rank 0",
            remedy="start again when all nodes see the same set",
        )
    world.peers.all_or_none(error)
    return train_set


@dataclass(frozen=True)
class _StageRun:
    """One stage of a run, on one rank. The field `whole` holds the recipe of all stages."""

    whole: Recipe
    stage: Stage
    run_dir: Path
    world: World
    preemption: Preemption
    allow: tuple[str, ...]
    extra_hooks: Sequence[Hook]

    @cached_property
    def recipe(self) -> Recipe:
        """As the stage sees it."""
        return self.whole.at(self.stage)

    @property
    def folder(self) -> Path:
        return self.run_dir / self.stage

    def run(self) -> None:
        recipe, world = self.recipe, self.world
        world.peers.on_rank0(lambda: heartbeat.clear(self.folder))
        status = rundir.Status(self.folder, stage=self.stage, writes=world.is_main)
        watchdog = Watchdog(self.folder, status, world=world, faults=recipe.faults, timeout_s=recipe.parallel.timeout_s)
        with status.told(), watchdog, watchdog.errors_told(), ExitStack() as to_close:
            train_set = open_alike(recipe, world=world)
            order = stage_order(train_set, recipe, self.stage)
            task = self._task(train_set)
            if task.close is not None:
                to_close.callback(task.close)
            schedule = self._schedule(task, order.steps_per_epoch)
            state = self._state(task, train_set)

            checkpoints = Tiers(self.folder / "checkpoints", saving=recipe.checkpoint, world=world.peers)
            with checkpoints as saver, watchdog.errors_told():
                resumed = state.resume(saver)
                if state.step > schedule.total:  # possible only if --allow has made the stage shorter
                    raise CheckpointMismatch(f"{resumed}: the stage would end at step {schedule.total}, before it")
                world.peers.on_rank0(lambda: rundir.save_resolved(self.whole, self.run_dir))  # it is accepted now
                status.write("running", step=state.step, total_steps=schedule.total)
                plan = stage_batches(recipe, self.stage, world_size=world.world_size)
                self._announce(task, plan, state.strategy, resumed)
                if resumed is None and task.begin is not None:
                    watchdog.at("evaluation", state.step)
                    task.begin(state.strategy)

                log = self._metrics_log(state, train_set)
                evaluate = Evaluate(task.evaluate, log=log, watchdog=watchdog) if task.evaluate else None
                save = Save(saver, status=status, log=log, watchdog=watchdog)
                hooks = self._hooks(task, saver, watchdog=watchdog, log=log, evaluate=evaluate, save=save)
                loop = Loop(task, state, schedule=schedule, plan=plan, world=world, hooks=hooks)
                loop.run(lambda step: watchdog.waits_seen(self._batches(train_set, loop, step)))

            if evaluate is not None:
                report = evaluate.of_final(loop).report
                if world.is_main:
                    self._write_evaluation(report, train_set, loop)
            status.write("done", step=state.step, total_steps=schedule.total)

    def _task(self, train_set: ShardSet) -> StageTask:
        if self.stage == "pretrain":
            make = partial(pretrain_task, self.recipe, train_set, world=self.world)
        else:
            make = partial(finetune_task, self.recipe, train_set, run_dir=self.run_dir, world=self.world)
        return self.world.peers.run_all(make)

    def _schedule(self, task: StageTask, steps_per_epoch: int) -> Schedule:
        return Schedule(
            task.part.epochs,
            steps_per_epoch,
            self.recipe.checkpoint,
            evaluate_every_epochs=task.evaluate_every_epochs,
            log_every_steps=self.recipe.log.every_steps,
        )

    def _state(self, task: StageTask, train_set: ShardSet) -> TrainState:
        """The initial weights, as the recipe's strategy holds them."""
        strategy = make_strategy(
            self.recipe.parallel, task.model, task.groups, betas=task.part.betas, ema=task.average,
            make_optimizer=optim.optimizer_maker(task.part), world=self.world,
        )  # fmt: skip
        facts = run_facts(
            self.recipe, self.stage, train_set, strategy=strategy.name, origin=task.origin, teacher=task.teacher,
            scored_on=task.scored_on,
        )  # fmt: skip
        return TrainState(strategy, facts, anomalies=Anomalies(self.recipe.faults), allow=self.allow)

    def _hooks(
        self,
        task: StageTask,
        saver: Tiers,
        *,
        watchdog: Watchdog,
        log: MetricsLog,
        evaluate: Evaluate | None,
        save: Save,
    ) -> list[Hook]:
        """What the run does besides learning, in this order at each point of the loop."""
        logs, faults = self.recipe.log, self.recipe.faults
        profile_steps = logs.profile_steps if self.world.is_main or logs.profile_ranks == "all" else None
        every_steps = faults.digest_every_steps
        hooks = (
            watchdog,
            GarbageCollection(),
            Profiler(self.folder / "profile", steps=profile_steps) if profile_steps else None,
            LayerStats() if logs.layer_groups else None,
            log,
            ReplicaCheck(every_steps=every_steps) if every_steps else None,
            evaluate,
            save,
            Pictures(task.draw, self.folder / "samples", log=log) if task.draw else None,
            AnomalyPolicy(saver, self.folder),
            *self.extra_hooks,
            StopOnRequest(self.preemption, saver),
        )
        return [hook for hook in hooks if hook is not None]

    def _metrics_log(self, state: TrainState, train_set: ShardSet) -> MetricsLog:
        num_classes, world = train_set.num_classes, self.world
        speed = speed_of(
            self.recipe, self.stage, num_classes=num_classes, device=world.device, world_size=world.world_size
        )
        trackers = world.peers.run_all(lambda: self._trackers(state.step))
        lockstep = state.strategy.lockstep
        ranks = RankTimes(world.peers, stage=self.stage, lockstep=lockstep) if world.world_size > 1 else None
        return MetricsLog(self.folder, speed=speed, trackers=trackers, ranks=ranks)

    def _trackers(self, start_step: int) -> Trackers | None:
        if not self.world.is_main:
            return None
        sent_to = last_step_written(self.folder)
        return open_trackers(self.recipe, self.stage, run_dir=self.run_dir, start_step=start_step, sent_to=sent_to)

    def _batches(self, train_set: ShardSet, loop: Loop, done: int) -> Iterator[Batch]:
        epoch, step = divmod(done, loop.schedule.steps_per_epoch)
        batches = train_batches(
            train_set,
            self.recipe,
            stage=self.stage,
            rank=self.world.rank,
            world_size=self.world.world_size,
            micro_batch=loop.plan.micro_batch,
            epoch=epoch,
            step=step,
            local_ranks=self.world.local_size,
            demand=measured_demand(self.folder),
        )
        _log.info("%s: %s", self.stage, batches.loading)
        return iter(batches)

    def _write_evaluation(self, report: dict[str, Any], train_set: ShardSet, loop: Loop) -> None:
        end = loop.schedule.position(loop.schedule.total)
        checkpoint = step_name(end.step)
        weights = evaluation.weights_lineage(loop.state.facts, step=end.step, epoch=end.epoch, checkpoint=checkpoint)
        weights["checkpoint_digest"] = read_manifest(self.folder / "checkpoints" / checkpoint).files_digest
        evaluation.write_eval(report, self.folder / "eval.json", weights=weights)
        picture = self.folder / "samples" / "confusion.png"
        plots.confusion(report, train_set.manifest.class_names, picture)
        if self.recipe.log.tensorboard and picture.is_file():
            board = TensorBoard(self.folder)
            board.picture("confusion", picture, step=end.step)
            board.finish()

    def _announce(self, task: StageTask, plan: BatchPlan, strategy: Strategy, resumed: str | None) -> None:
        part, stage = task.part, self.stage
        sizes = (getattr(p, "ds_numel", p.numel()) for p in task.model.parameters())  # DeepSpeed leaves 0 in place
        trained = sum(p.numel() for p in task.model.parameters() if p.requires_grad) / 1e6
        frozen = f", {trained:.3f} M of them trained ({part.tuning.phrase})" if part.tuning.freezes else ""
        _log.info("%s: %.1f M parameters%s, %s, %s", stage, sum(sizes) / 1e6, frozen, strategy.name, plan)
        _log.info("%s: peak lr %.3g = %.3g · %d / 256", stage, part.peak_lr, part.base_lr, part.global_batch)
        if self.world.world_size > 1 and running_statistics(task.model):
            _log.info("%s: batch norm sees one rank's micro-batch: the result depends on the number of ranks", stage)
        if resumed:
            _log.info("%s: resumed from %s", stage, resumed)


class _alone:
    """The run's lock, taken by rank 0 for all; if it is refused, every rank raises the same error."""

    def __init__(self, run_dir: Path, world: World) -> None:
        self._lock, self._world = rundir.hold(run_dir), world

    def __enter__(self) -> None:
        self._world.peers.on_rank0(self._lock.__enter__)

    def __exit__(self, *error: Any) -> None:
        if self._world.is_main:
            self._lock.__exit__(*error)
