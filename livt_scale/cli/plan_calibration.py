"""`livt plan --calibrate FILE`: the times of a measured run, or of benchmarks/gpu.sh, over the planned ones.

    RUN/pretrain/metrics.jsonl   the median step without its waits for data; RUN/recipe.yaml says what was trained
    OUT/gpu.jsonl                the line of the same network, compiled or not, on one GPU

What was measured with another network, precision or device is refused: its ratio says nothing about this plan.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from livt_scale.util.errors import RunError, UsageError

if TYPE_CHECKING:
    from livt_scale.config.recipe import Recipe, Stage
    from livt_scale.plan.task import MeasuredRun, PlanTask
    from livt_scale.train.run_files import MetricsLine

OTHER_STAGE = 0.2  # relative uncertainty of another stage than the one that was measured
SAME_STAGE = 0.07
OTHER_GPUS = 0.13  # of the same stage on another number of GPUs
SAME_PEAK = 0.02
SAME_FLOPS = 0.01
REMEDY = "give a metrics.jsonl in a run's stage, or a gpu.jsonl of benchmarks/gpu.sh, of this network and device"


def calibrated(tasks: Mapping[Stage, PlanTask], path: Path) -> dict[Stage, PlanTask]:
    """The tasks with what `path` measured. UsageError: it cannot be used for them."""
    entries = _gpu_lines(path)
    stage, known, gpus = _from_gpu(entries, tasks, path) if entries else _from_run(tasks, path)
    found = {}
    for name, task in tasks.items():
        width = SAME_STAGE if gpus == task.gpus else OTHER_GPUS
        found[name] = replace(task, calibration=replace(known, width=width if name == stage else OTHER_STAGE))
    return found


def _from_run(tasks: Mapping[Stage, PlanTask], path: Path) -> tuple[Stage, MeasuredRun, int]:
    from livt_scale.config.load import load_saved
    from livt_scale.train.run_files import of_last_world, read_metrics

    try:
        lines = read_metrics(path, strict=True).lines
    except RunError as error:
        raise UsageError(f"--calibrate: {error.message}", remedy=REMEDY) from error
    stage = next((name for name in tasks if name == path.absolute().parent.name), None)
    saved = path.absolute().parent.parent / "recipe.yaml"
    if stage is None or not saved.exists():
        raise UsageError(
            f"--calibrate {path}: it is not in the folder of one of the plan's stages ({', '.join(tasks)}) in a run",
            remedy=REMEDY,
        )
    used = of_last_world([line for line in lines if line.step_s and line.world_size])[1:]
    if not used:
        raise UsageError(f"--calibrate: {path} has no line but the first with step_s", remedy="train more steps")
    recipe, task = load_saved(saved), tasks[stage]
    _check_network(recipe, task, path)
    gpus = int(used[-1].world_size or 1)
    there = replace(task, recipe=recipe.at(stage), gpus=gpus)
    _check_device(used, there, path)
    busy_s = statistics.median((line.step_s or 0.0) - (line.data_wait_s or 0.0) for line in used)
    return stage, _measured(busy_s, _planned_s(there), path), gpus


def _from_gpu(
    entries: Sequence[Mapping[str, Any]], tasks: Mapping[Stage, PlanTask], path: Path
) -> tuple[Stage, MeasuredRun, int]:
    from livt_scale.plan.devices import named
    from livt_scale.plan.stage_plan import plan_stage, spread_of
    from livt_scale.train.run_files import is_number

    machine = next((entry for entry in entries if entry.get("name") == "machine"), {})
    device = named(str(machine.get("device") or ""))
    task = tasks.get("pretrain")
    if task is None:
        raise UsageError(f"--calibrate {path}: it measures pretraining, which this recipe does not have", remedy=REMEDY)
    if device is None or device.peak_tflops("bf16") != task.device.peak_tflops.bf16:
        raise UsageError(
            f"--calibrate {path}: it was measured on {machine.get('device') or 'no known GPU'}, and the plan is for "
            f"{task.device.name}",
            remedy=REMEDY,
        )
    parallel, gflop = task.recipe.parallel, task.flops.train / 1e9
    for entry in entries:
        words = str(entry.get("name", "")).replace(",", "").split()
        numbers = [entry.get(key) for key in ("gflop_per_image", "step_s", "batch")]
        flops, step_s, batch = (float(number) if is_number(number) else 0.0 for number in numbers)
        same = abs(flops / gflop - 1) < SAME_FLOPS
        same &= ("compiled" in words) == parallel.compile and "recomputed" not in words and "fsdp" not in words
        if entry.get("part") == "mfu" and same and step_s > 0 and batch >= 1:
            there = replace(task, gpus=1)
            spread = spread_of(there, "ddp", micro_batch=int(batch), accumulation=1, recompute=False)
            planned_s = plan_stage(there, spread).time.gpu_s
            return "pretrain", _measured(step_s, planned_s, path), 1
    raise UsageError(
        f"--calibrate {path}: no line of part mfu has {gflop:.1f} GFLOP per image, "
        f"{'' if parallel.compile else 'not '}compiled",
        remedy=REMEDY,
    )


def _gpu_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a gpu.jsonl; none if the file is of another kind."""
    from livt_scale.util.outside import parse_json, read_checked

    try:
        lines = [parse_json(line) for line in read_checked(path, "lines").splitlines() if line.strip()]
    except (OSError, ValueError):
        return []  # read_metrics says what is wrong
    return lines if lines and all(isinstance(line, dict) and "part" in line for line in lines) else []


def _check_network(recipe: Recipe, task: PlanTask, path: Path) -> None:
    there, here = recipe.at(task.stage), task.recipe
    pairs = (
        ("model", there.model, here.model, f"{there.model.name}, and here {here.model.name}"),
        ("precision", there.parallel.precision, here.parallel.precision, f"{there.parallel.precision}"),
    )
    for what, of_run, of_plan, said in pairs:
        if of_run != of_plan:
            raise UsageError(f"--calibrate {path}: the run has another {what} than the plan ({said})", remedy=REMEDY)


def _check_device(lines: Sequence[MetricsLine], task: PlanTask, path: Path) -> None:
    """By the peak that the lines' MFU was divided by."""
    from livt_scale.plan.assumptions import peak_tflops

    peaks = [
        task.flops.train * line.images_per_s / (line.world_size or 1) / line.mfu / 1e12
        for line in lines
        if line.mfu and line.images_per_s
    ]
    planned = peak_tflops(task.device, task.recipe.parallel.precision)
    if not peaks:
        raise UsageError(
            f"--calibrate: {path} has no line but the first with an mfu, so its device is not known",
            remedy="it needs a run on a known GPU, or one with log.peak_tflops set",
        )
    peak = statistics.median(peaks)
    if abs(peak / planned - 1) > SAME_PEAK:
        raise UsageError(
            f"--calibrate {path}: it was measured on a device of {peak:.0f} TFLOP/s, and the plan is for "
            f"{task.device.name} with {planned:.0f}",
            remedy=REMEDY,
        )


def _planned_s(task: PlanTask) -> float:
    """Seconds of the run's own step by the plan, without waits for data."""
    from livt_scale.plan.stage_plan import candidates, plan_stage, spread_of
    from livt_scale.train.batch_plan import plan_batches

    parallel, part = task.recipe.parallel, task.part
    batches = plan_batches(part.global_batch, part.micro_batch, world_size=task.gpus, pairs=part.mixes)
    strategy = parallel.strategy if parallel.strategy != "auto" else candidates(task)[0].spread.strategy
    spread = spread_of(
        task, strategy, micro_batch=batches.micro_batch, accumulation=batches.accumulation,
        recompute=parallel.activation_checkpointing,
    )  # fmt: skip
    return plan_stage(task, spread).time.gpu_s


def _measured(measured_s: float, planned_s: float, path: Path) -> MeasuredRun:
    from livt_scale.plan.task import MeasuredRun

    return MeasuredRun(measured_s / planned_s, SAME_STAGE, str(path))
