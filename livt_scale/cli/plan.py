"""`livt plan`: parse, plan each stage, print a summary or everything (`livt_scale.cli.plan_screen`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Force, Price, RecipeFile, Sets
from livt_scale.cli.output import echo
from livt_scale.config.capabilities import STRATEGIES
from livt_scale.plan.devices import DEVICES
from livt_scale.util.errors import UsageError, nearest

if TYPE_CHECKING:
    from livt_scale.config.recipe import Recipe
    from livt_scale.plan.assumptions import Accelerator, Assumptions
    from livt_scale.plan.stage_plan import StagePlan
    from livt_scale.plan.task import DataSet, PlanTask

SCHEMA_VERSION = 2  # of --json: 1 had no range, no limit and one MFU
ASSUME_HELP = "Change an assumption. Repeatable."


def plan(
    recipe: RecipeFile,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Total number of devices.")],
    sets: Sets = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, help="Devices of a node.", show_default="from the device")
    ] = None,
    device: Annotated[str, typer.Option("--device", help=f"{', '.join(DEVICES)}, or a YAML file.")] = "h100",
    strategy: Annotated[
        str | None, typer.Option("--strategy", help="auto: the fastest that fits.", show_default="the recipe's")
    ] = None,
    time_limit: Annotated[float, typer.Option("--time-limit", min=0.1, help="Hours per job.")] = 24,
    price: Price = None,
    assume: Annotated[list[str] | None, typer.Option("--assume", metavar="<name=value>", help=ASSUME_HELP)] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Training images, if there are no shards.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Classes, if there are no shards.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="metrics.jsonl of a run, or gpu.jsonl: use its times.")
    ] = None,
    details: Annotated[bool, typer.Option("--details", help="Print parts, candidates and assumptions too.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Measure the peak memory on fake tensors.")] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="PNG file: plot memory and hours.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, time and cost of a run on given GPUs.

    livt plan recipes/imagenet_lt/vit_h14.yaml --gpus 64 --device h100
    """
    from livt_scale.cli.plan_calibration import calibrated
    from livt_scale.plan.assumptions import accelerator, assumptions
    from livt_scale.plan.task import PlanTask
    from livt_scale.train.planned_stage import data_set, planned_stage

    loaded = _load(recipe, sets or [])
    kind = accelerator(device)
    assumed = assumptions(assume or [])
    data = data_set(loaded, assumed, images=images, classes=classes)
    wanted = strategy or loaded.parallel.strategy
    _check_strategy(wanted)
    _check_picture(picture, force=force)
    per_node = gpus_per_node or kind.gpus_per_node
    tasks = {s: PlanTask(loaded.at(s), s, data, gpus, per_node, kind, assumed) for s in loaded.stage_names}
    if loaded.model.timm is not None:
        about_times = {"--calibrate": calibrate, "--picture": picture, "--price-per-gpu-hour": price}
        _plan_timm(tasks["finetune"], wanted, refused=about_times, as_json=as_json)
        return
    found, plans = [], []
    for task in (tasks if calibrate is None else calibrated(tasks, calibrate)).values():
        planned, tried = planned_stage(task, wanted)
        plans.append(planned)
        found.append(_stage(planned, tried, time_limit=time_limit, price=price, exact=exact))
    if picture is not None:
        from livt_scale.plan.figure import draw

        draw(plans, picture)
    answer = _answer(found, kind=kind, assumed=assumed, data=data, gpus=gpus, price=price)
    echo(json.dumps(answer, indent=2) if as_json else _screen(answer, details=details))


def _load(recipe: Path, sets: list[str]) -> Recipe:
    """UsageError: it trains a ResNet."""
    from livt_scale.config.load import load_recipe

    loaded = load_recipe(recipe, sets=sets)
    if loaded.model.is_resnet:
        raise UsageError(
            f"{recipe}: model.size is {loaded.model.size}, and a plan estimates the memory of ViTs only",
            remedy="take a vit_*, or train a few steps: metrics.jsonl has their time and memory",
        )
    return loaded


def _plan_timm(task: PlanTask, wanted: str, *, refused: dict[str, Path | float | None], as_json: bool) -> None:
    """Print the plan of a model of timm, which has no time. UsageError for options that are about times."""
    from livt_scale.plan.timm_plan import NO_TIME, lines, timm_plan
    from livt_scale.train.planned_stage import as_wanted

    for option, value in refused.items():
        if value is not None:
            raise UsageError(f"{option} is about times, and {NO_TIME}", remedy="leave it out")
    cut, strategy = as_wanted(task, wanted)
    found = timm_plan(task, strategy, micro_batch=cut.micro_batch, accumulation=cut.accumulation)
    answer = found.as_json()
    if not as_json:
        echo("\n".join(lines(answer)))
        return
    first = {name: answer[name] for name in ("params", "train_flops_per_image", "memory_gib", "hours", "fits")}
    whole = {"schema_version": SCHEMA_VERSION, **first, "gpus": task.gpus, "device": task.device.model_dump()}
    echo(json.dumps({**whole, "stages": [answer]}, indent=2))


def _screen(answer: dict[str, Any], *, details: bool) -> str:
    from livt_scale.cli.plan_screen import detail_lines, summary_lines

    return "\n".join(detail_lines(answer) if details else summary_lines(answer))


def _check_strategy(wanted: str) -> None:
    names = ("auto", *STRATEGIES)
    if wanted not in names:
        raise UsageError(f"no strategy is called {wanted!r}", remedy=nearest(wanted, names))


def _check_picture(picture: Path | None, *, force: bool) -> None:
    if picture is None:
        return
    from livt_scale.plan.figure import MARK
    from livt_scale.util.outputs import check_output

    if picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: it is a PNG", remedy=f"name it {picture.with_suffix('.png').name}")
    check_output(picture, marks=[MARK], command="plan", force=force)


def _stage(
    planned: StagePlan, tried: list[StagePlan], *, time_limit: float, price: float | None, exact: bool
) -> dict[str, Any]:
    from livt_scale.plan.numbers import figures
    from livt_scale.plan.stage_plan import best, strategies_for

    task, chosen = planned.task, best(tried)
    figure = figures(planned, price=price)
    figure["segments"], figure["segments_how"] = _segments(planned, time_limit)
    figure["best"] = None if chosen is None else _short(chosen)
    figure["candidates"] = [_short(p) for p in tried]
    figure["strategies_tried"] = list(strategies_for(task.recipe.stage(task.stage)))
    if exact:
        from livt_scale.plan.exact import measure
        from livt_scale.plan.memory import GIB

        measured = measure(task.recipe, task.stage, planned.spread, num_classes=task.data.classes)
        figure["exact_gib"] = {
            "measured": measured.measured, "states": measured.states / GIB, "peak": measured.peak / GIB,
            "activations": measured.activations / GIB, "process": measured.resident_bytes / GIB,
        }  # fmt: skip
    return figure


def _segments(planned: StagePlan, time_limit: float) -> tuple[int | None, str]:
    """By the chain's own rule: what `livt submit` would make of the step time at the high end."""
    from livt_scale.slurm.chain import num_segments
    from livt_scale.slurm.sites import Resources
    from livt_scale.slurm.step_times import Measured

    task, save_s = planned.task, planned.checkpoint.stall_s + planned.checkpoint.write_s
    slurm = task.recipe.slurm.model_copy(update={"start_s": task.assumed.start_s, "step_s": None})
    asked = Resources(task.nodes, min(task.per_node, task.gpus), 0, None, max(int(time_limit * 60), 1), None)
    step_s = planned.step_s_high
    known = Measured(total=task.steps, planned_step_s=step_s, longest_step_s=step_s, save_s=save_s)
    try:
        return num_segments(slurm, task.stage, asked, known)
    except UsageError as error:  # more than a chain may have: the plan reports it and continues
        return None, error.message


def _short(p: StagePlan) -> dict[str, Any]:
    return {
        "strategy": p.spread.strategy,
        "activation_checkpointing": p.spread.recompute,
        "micro_batch": p.spread.micro_batch,
        "peak_gib": p.memory.gib()["peak"],
        "hours": p.hours,
        "fits": p.fits,
        "why_not": p.why_not or None,
    }


def _answer(
    stages: list[dict[str, Any]],
    *,
    kind: Accelerator,
    assumed: Assumptions,
    data: DataSet,
    gpus: int,
    price: float | None,
) -> dict[str, Any]:
    heaviest = max(stages, key=lambda s: s["memory_gib"]["peak"])
    segments = [s["segments"] for s in stages]
    low_end, high_end = assumed.at("low"), assumed.at("high")
    hours, low, high = (sum(s[name] for s in stages) for name in ("hours", "hours_low", "hours_high"))
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: heaviest[name] for name in ("params", "train_flops_per_image", "memory_gib")},
        "hours": hours,
        "hours_low": low,
        "hours_high": high,
        "device_hours": hours * gpus,
        "segments": None if None in segments else sum(segments),
        "fits": all(s["fits"] for s in stages),
        **{
            f"cost{end}": None if price is None else h * gpus * price
            for end, h in (("", hours), ("_low", low), ("_high", high))
        },
        "gpus": gpus,
        "nodes": stages[0]["nodes"],
        "device": kind.model_dump(),
        "device_defaults": list(kind.constants.missing),
        "data": {"images": data.images, "classes": data.classes, "image_bytes": data.image_bytes, "from": data.source},
        "stages": stages,
        "assumptions": {
            name: {
                "value": getattr(assumed, name),
                "changed": name in assumed.model_fields_set,
                "is": field.description,
                "low": getattr(low_end, name),
                "high": getattr(high_end, name),
            }
            for name, field in type(assumed).model_fields.items()
        },
    }
