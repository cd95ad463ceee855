"""`livt plan`: parse, plan each stage, print what it takes and what was assumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Force, RecipeFile, Sets
from livt_scale.cli.output import echo
from livt_scale.config.capabilities import STRATEGIES
from livt_scale.plan.devices import DEVICES
from livt_scale.util.errors import LivtError, RunError, UsageError, nearest

if TYPE_CHECKING:
    from livt_scale.config.recipe import Recipe
    from livt_scale.plan.assumptions import Accelerator, Assumptions
    from livt_scale.plan.stage_plan import DataSet, PlanTask, StagePlan

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
    price: Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0, help="Any currency.")] = None,
    mfu: Annotated[float | None, typer.Option("--mfu", help="Same as --assume mfu=….")] = None,
    assume: Annotated[list[str] | None, typer.Option("--assume", metavar="<name=value>", help=ASSUME_HELP)] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Training images, if there are no shards.")
    ] = None,
    classes: Annotated[int | None, typer.Option("--classes", min=1, help="Classes, if there are no shards.")] = None,
    calibrate: Annotated[Path | None, typer.Option("--calibrate", help="Use the MFU of a metrics.jsonl.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Measure the peak memory on fake tensors.")] = False,
    picture: Annotated[Path | None, typer.Option("--picture", help="PNG file: plot memory and hours.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, time and cost of a run on given GPUs.

    livt plan recipes/imagenet_lt/vit_h14.yaml --gpus 64 --device h100
    """
    from livt_scale.config.load import load_recipe
    from livt_scale.plan.assumptions import accelerator
    from livt_scale.plan.stage_plan import PlanTask

    loaded = load_recipe(recipe, sets=sets or ())
    if not loaded.model.is_vit:
        raise UsageError(
            f"{recipe}: model.size is {loaded.model.size}, and a plan estimates the memory of ViTs only",
            remedy="take a vit_*, or train a few steps: metrics.jsonl has their time and memory",
        )
    kind = accelerator(device)
    assumed, changed = _assumptions(assume or [], mfu=mfu, calibrate=calibrate)
    data = _data_set(loaded, assumed, images=images, classes=classes)
    wanted = strategy or loaded.parallel.strategy
    names = ("auto", *STRATEGIES)
    if wanted not in names:
        raise UsageError(f"no strategy is called {wanted!r}", remedy=nearest(wanted, names))
    if picture is not None:
        _check_picture(picture, force=force)
    found, plans = [], []
    for stage in loaded.stage_names:
        task = PlanTask(loaded.at(stage), stage, data, gpus, gpus_per_node or kind.gpus_per_node, kind, assumed)
        planned, tried = _planned(task, wanted)
        plans.append(planned)
        found.append(_stage(planned, tried, time_limit=time_limit, price=price, exact=exact))
    if picture is not None:
        from livt_scale.plan.figure import draw

        draw(plans, picture)
    answer = _answer(found, kind=kind, assumed=assumed, changed=changed, data=data, gpus=gpus, price=price)
    echo(json.dumps(answer, indent=2)) if as_json else _print(answer)


def _check_picture(picture: Path, *, force: bool) -> None:
    from livt_scale.plan.figure import MARK
    from livt_scale.util.outputs import check_output

    if picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: it is a PNG", remedy=f"name it {picture.with_suffix('.png').name}")
    check_output(picture, marks=[MARK], command="plan", force=force)


def _assumptions(
    changes: list[str], *, mfu: float | None, calibrate: Path | None
) -> tuple[Assumptions, frozenset[str]]:
    from livt_scale.plan.assumptions import assume

    if mfu is not None and calibrate is not None:
        raise UsageError("--mfu and --calibrate both say the MFU", remedy="give one")
    if calibrate is not None:
        mfu = _measured_mfu(calibrate)
    return assume([*changes, *([] if mfu is None else [f"mfu={mfu}"])])


def _measured_mfu(path: Path) -> float:
    """The median `mfu` of a run's lines, less the first, which starts slowly."""
    import statistics

    from livt_scale.train.run_files import read_metrics

    try:
        lines = read_metrics(path, strict=True).lines
    except RunError as error:
        raise UsageError(f"--calibrate: {error.message}", remedy="give a metrics.jsonl of a run") from error
    values = [line.mfu for line in lines[1:] if line.mfu is not None]
    if not values:
        raise UsageError(
            f"--calibrate: {path} has no line but the first with an mfu",
            remedy="it needs a run on a known GPU, or one with log.peak_tflops set",
        )
    return round(statistics.median(values), 4)


def _data_set(recipe: Recipe, assumed: Assumptions, *, images: int | None, classes: int | None) -> DataSet:
    """The sizes given, else those of the shards, else the published size of the set that the folder is named after."""
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.plan.published import published
    from livt_scale.plan.stage_plan import DataSet

    size = assumed.image_kib * 1024
    if images is not None:
        if classes is None and recipe.stages.finetune is not None:
            raise UsageError("--images goes with --classes: the classifier's head has one row a class")
        return DataSet(images, classes or 1, size, "--images and --classes")
    try:
        shards = ShardSet.open(recipe.data.train, data=recipe.data)
    except (LivtError, OSError) as error:
        known = published(recipe.data.train)
        if known is None:
            raise UsageError(
                f"how many images data.train has is not known: {error}", remedy="give --images and --classes"
            ) from error
        name, number, number_of_classes = known
        return DataSet(number, classes or number_of_classes, size, f"{name}'s published size: its shards are not here")
    manifest = shards.manifest
    mean = sum(s.bytes for s in manifest.shards) / max(manifest.num_samples, 1)
    return DataSet(shards.num_samples, len(manifest.class_names), mean, "the shards' manifest")


def _planned(task: PlanTask, wanted: str) -> tuple[StagePlan, list[StagePlan]]:
    """The stage as requested, and all candidates that were tried."""
    from livt_scale.plan.stage_plan import best, candidates, plan_stage, spread_of, strategies_for
    from livt_scale.train.batch_plan import plan_batches

    parallel, part = task.recipe.parallel, task.recipe.stage(task.stage)
    if task.steps < 1:
        raise UsageError(f"{task.stage}: {task.data.images} images are no global batch of {part.global_batch}")
    batches = plan_batches(part.global_batch, part.micro_batch, world_size=task.gpus, pairs=part.mixes)
    possible = strategies_for(part)
    strategy = next((name for name in possible if name == wanted), None)
    if strategy is None and wanted != "auto":
        raise UsageError(
            f"{task.stage}: {wanted} takes neither LARS nor a frozen backbone", remedy=f"give {' or '.join(possible)}"
        )
    tried = candidates(task)
    if strategy is None:
        return best(tried) or min(tried, key=lambda p: p.memory.peak), tried
    spread = spread_of(
        task, strategy, micro_batch=batches.micro_batch, accumulation=batches.accumulation,
        recompute=parallel.activation_checkpointing,
    )  # fmt: skip
    return plan_stage(task, spread), tried


def _stage(
    planned: StagePlan, tried: list[StagePlan], *, time_limit: float, price: float | None, exact: bool
) -> dict[str, Any]:
    from livt_scale.plan.stage_plan import best, figures, strategies_for

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
    """By the chain's own rule: what `livt submit` would make of this step time."""
    from livt_scale.slurm.chain import num_segments
    from livt_scale.slurm.sites import Resources
    from livt_scale.slurm.step_times import Measured

    task, save_s = planned.task, planned.checkpoint.stall_s + planned.checkpoint.write_s
    slurm = task.recipe.slurm.model_copy(update={"start_s": task.assumed.start_s, "step_s": planned.time.step_s})
    asked = Resources(task.nodes, min(task.per_node, task.gpus), 0, None, max(int(time_limit * 60), 1), None)
    known = Measured(total=task.steps, step_s=planned.time.step_s, save_s=save_s)
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
    changed: frozenset[str],
    data: DataSet,
    gpus: int,
    price: float | None,
) -> dict[str, Any]:
    heaviest = max(stages, key=lambda s: s["memory_gib"]["peak"])
    segments = [s["segments"] for s in stages]
    hours = sum(s["hours"] for s in stages)
    return {
        **{name: heaviest[name] for name in ("params", "train_flops_per_image", "memory_gib")},
        "hours": hours,
        "device_hours": hours * gpus,
        "segments": None if None in segments else sum(segments),
        "fits": all(s["fits"] for s in stages),
        "cost": None if price is None else hours * gpus * price,
        "gpus": gpus,
        "device": kind.model_dump(),
        "data": {"images": data.images, "classes": data.classes, "image_bytes": data.image_bytes, "from": data.source},
        "stages": stages,
        "assumptions": {
            name: {"value": getattr(assumed, name), "changed": name in changed, "is": field.description}
            for name, field in type(assumed).model_fields.items()
        },
    }


def _print(answer: dict[str, Any]) -> None:
    data, device = answer["data"], answer["device"]
    echo(f"{answer['gpus']} x {device['name']}; {data['images']} images, {data['classes']} classes ({data['from']})")
    for stage in answer["stages"]:
        echo("\n" + "\n".join(_stage_lines(stage)))
    cost = "" if answer["cost"] is None else f", cost {answer['cost']:.0f}"
    echo(f"\nall stages: {_time(answer['hours'] * 3600)}, {_count(answer['device_hours'])} device hours{cost}")
    echo("\nassumed (change with --assume NAME=VALUE, or --device FILE.yaml):")
    for name, one in answer["assumptions"].items():
        echo(f"  {name:<20} {one['value']:>8g}{' *' if one['changed'] else '  '} {one['is']}")
    said = ", ".join(
        f"{name} {value}" for name, value in device.items() if not isinstance(value, dict) and name != "name"
    )
    echo(f"  device               {said}, peak TFLOP/s {device['peak_tflops']}")


def _stage_lines(s: dict[str, Any]) -> list[str]:
    memory, checkpoint = s["memory_gib"], s["checkpoint"]
    lines = [
        f"{s['stage']}: {s['strategy']}{', recomputed' if s['activation_checkpointing'] else ''}, micro-batch "
        f"{s['micro_batch']} x {s['accumulation']}: {'fits' if s['fits'] else 'does NOT fit: ' + s['why_not']}",
        f"  {s['params'] / 1e6:.1f} M weights; {_flops(s['train_flops_per_image'])} a training image "
        f"({_flops(s['hardware_flops_per_image'])} computed)",
        "  memory a rank: " + ", ".join(f"{name} {_gib(value)}" for name, value in memory.items())
        + f" of {_gib(s['usable_gib'])} usable",
    ]  # fmt: skip
    if s["offload"] != "none":
        where = "memory" if s["offload"] == "cpu" else "disk"
        lines.append(f"  offloaded to a node's {where}: {_gib(s['offloaded_gib_per_node'])}")
    if "exact_gib" in s:
        exact = s["exact_gib"]
        lines.append(f"  measured ({exact['measured']}): states {_gib(exact['states'])}, peak {_gib(exact['peak'])}")
    offload = f" + {_time(s['offload_s'])} to and from the host" if s["offload_s"] else ""
    energy = "" if s["energy_kwh"] is None else f", {_count(s['energy_kwh'])} kWh"
    cost = "" if s["cost"] is None else f", cost {s['cost']:.0f}"
    lines += [
        f"  step {_time(s['step_s'])} = {_time(s['compute_s'])} computing + {_time(s['exposed_exchange_s'])} exchange "
        f"(of {_time(s['exchange_s'])}, {_bytes(s['exchanged_bytes_per_rank'])} a rank) + {_time(s['optimizer_s'])} "
        f"{s['optimizer']}{offload}; MFU {s['mfu']:.2g}",
        f"  {s['steps']} steps: {_time(s['hours'] * 3600)}, {_count(s['device_hours'])} device hours{energy}{cost}",
        f"  {s['segments_how']}",
        f"  {s['images_per_s']:.0f} images/s: reads {_bytes(s['read_gb_s'] * 1e9)}/s, {_bytes(s['read_tb'] * 1e12)} in "
        f"all; {math.ceil(s['decode_cores_per_node'])} cores a node decode",
        f"  checkpoint {_bytes(checkpoint['bytes'])}: stalls {_time(checkpoint['stall_s'])}, written in "
        f"{_time(checkpoint['write_s'])}; every {checkpoint['every_steps']} steps loses "
        f"{checkpoint['lost_share']:.2%}, Daly's every {_time(checkpoint['daly_interval_s'])} "
        f"{checkpoint['lost_share_daly']:.2%}",
        f"  best: {_named(s['best']) if s['best'] else 'nothing fits'}",
    ]
    for one in s["candidates"]:
        lines.append(
            f"    {_named(one):<44} {_time(one['hours'] * 3600):>9} {_gib(one['peak_gib']):>10}  "
            f"{one['why_not'] or 'fits'}"
        )
    return lines


def _in_units(value: float, units: tuple[tuple[str, float], ...]) -> str:
    """`value` in the largest unit of which it is at least one: three digits, or all of the integer part."""
    name, size = next(((name, size) for name, size in units if value >= size), units[-1])
    return f"{_count(value / size)} {name}"


def _count(number: float) -> str:
    return f"{number:.0f}" if number >= 100 or number == 0 else f"{number:.3g}"


def _gib(gib: float) -> str:
    return _in_units(gib, (("GiB", 1), ("MiB", 2**-10), ("KiB", 2**-20)))


def _bytes(number: float) -> str:
    return _in_units(number, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)))


def _time(seconds: float) -> str:
    return _in_units(seconds, (("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def _flops(number: float) -> str:
    return _in_units(number, (("GFLOP", 1e9), ("MFLOP", 1e6)))


def _named(one: dict[str, Any]) -> str:
    again = ", recomputed" if one["activation_checkpointing"] else ""
    return f"{one['strategy']}{again}, micro-batch {one['micro_batch']}"
