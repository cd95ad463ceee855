"""A plan as a plot: memory of a rank by strategy at its peak, and hours against the number of GPUs.

    draw(plans, Path("plan.png"))   # a panel of bars for each stage, and one of the hours of all stages

Bars: the plan's own micro-batch, blocks kept and recomputed; their parts add up to the peak. Hours: all stages, each by
the strategy's fastest micro-batch that fits, on 1, 2, 4, … 4096 GPUs, as far as the global batches can be cut. The same
input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from livt_scale.config.capabilities import STRATEGIES
from livt_scale.plan.memory import GIB, MemoryPeak
from livt_scale.plan.stage_plan import StagePlan, candidates, plan_stage, spread_of
from livt_scale.plan.task import PlanTask
from livt_scale.util.plots import GREY, MARKERS, PALETTE, log_scale, png_figure

MADE_BY = "livt plan"
MARK = f"Software\0{MADE_BY}".encode()  # in every picture
MAX_GPUS = 4096
PARTS = {  # of a `MemoryPeak`, in the order in which they are stacked: label and colour
    "weights": ("parameters", PALETTE[0]),
    "grads": ("gradients", PALETTE[1]),
    "moments": ("AdamW's moments", PALETTE[2]),
    "computing": ("activations, casts", PALETTE[3]),
    "buffers": ("gathered and exchanged", PALETTE[5]),
}
FAR = 3.0  # a limit beyond this multiple of the longest bar is written, not drawn: the bars would be slivers
UNITS = ((1, "h"), (60, "min"), (3600, "s"))


def draw(plans: Sequence[StagePlan], path: Path) -> None:
    """Write the picture of a run's stages, all on one number of GPUs, to `path` (PNG)."""
    with png_figure(path, width=4.6 * (len(plans) + 1), height=4.4, made_by=MADE_BY) as figure:
        axes = figure.subplots(1, len(plans) + 1, squeeze=False)[0]
        for panel, planned in zip(axes, plans, strict=False):
            _memory(panel, planned)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
        _hours(axes[-1], [planned.task for planned in plans])


def by_strategy(planned: StagePlan) -> list[StagePlan]:
    """The same micro-batch under each strategy, kept and recomputed."""
    task, spread = planned.task, planned.spread
    cut = {"micro_batch": spread.micro_batch, "accumulation": spread.accumulation}
    return [
        plan_stage(task, spread_of(task, name, recompute=recompute, **cut))
        for name in STRATEGIES
        for recompute in (False, True)
    ]


def hours_by_gpus(tasks: Sequence[PlanTask]) -> dict[str, dict[int, float | None]]:
    """Strategy -> GPUs -> hours of all stages; None: a stage does not fit; no entry: a batch cannot be cut so."""
    found: dict[str, dict[int, float | None]] = {name: {} for name in STRATEGIES}
    gpus = 1
    while gpus <= MAX_GPUS:
        spread = [replace(task, gpus=gpus) for task in tasks]
        if all(task.can_be_cut for task in spread):
            tried = [candidates(task) for task in spread]
            for name in STRATEGIES:
                best = [
                    min((p.hours for p in of if p.spread.strategy == name and p.fits), default=None) for of in tried
                ]
                found[name][gpus] = None if None in best else sum(filter(None, best))
        gpus *= 2
    return found


def _memory(axes: Any, planned: StagePlan) -> None:
    task, plans = planned.task, list(reversed(by_strategy(planned)))
    peaks = [p.memory.at_peak for p in plans]
    longest, usable = max(peak.total for peak in peaks), task.usable_bytes
    size, unit = (GIB, "GiB") if longest >= GIB else (2**20, "MiB")
    _stack(axes, peaks, size)
    for row, peak in enumerate(peaks):
        axes.annotate(
            f"{peak.total / size:.1f}", (peak.total / size, row), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=7, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    axes.set_yticks(range(len(plans)), [_row(p) for p in plans])
    drawn = usable <= FAR * longest
    axes.set_xlim(0, 1.15 * max(longest, usable if drawn else 0) / size)
    limit = f"{task.usable_bytes / GIB:.1f} GiB of {task.device.name} usable"
    if drawn:
        axes.axvline(usable / size, color="#c00000", linestyle="--", linewidth=1.2)
    where = f"dashed: {limit}" if drawn else f"{limit}, far to the right"
    axes.set_xlabel(f"{unit} of a rank at its peak ({where})")
    spread = planned.spread
    axes.set_title(f"{task.stage}, {_gpus(task.gpus)}, micro-batch {spread.micro_batch} × {spread.accumulation}")


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def _row(planned: StagePlan) -> str:
    return planned.spread.strategy + (", recomputed" if planned.spread.recompute else "")


def _stack(axes: Any, peaks: Sequence[MemoryPeak], size: int) -> None:
    left = [0.0] * len(peaks)
    for name, (label, colour) in PARTS.items():
        wide = [getattr(peak, name) / size for peak in peaks]
        axes.barh(range(len(peaks)), wide, left=left, color=colour, label=label, height=0.75)
        left = [a + b for a, b in zip(left, wide, strict=True)]


def _hours(axes: Any, tasks: Sequence[PlanTask]) -> None:
    """One line per strategy; the dotted line is perfect scaling from the first point."""
    found = hours_by_gpus(tasks)
    fitting = {gpus: h for hours in found.values() for gpus, h in hours.items() if h is not None}
    axes.set_title("all stages" if len(tasks) > 1 else tasks[0].stage)
    if not fitting:
        axes.text(0.5, 0.5, "nothing fits on any number of GPUs", ha="center", transform=axes.transAxes)
        return
    factor, unit = next((f, name) for f, name in UNITS if max(fitting.values()) * f >= 1 or name == "s")
    for name, colour, marker in zip(STRATEGIES, PALETTE, MARKERS, strict=False):
        at = {gpus: h * factor for gpus, h in found[name].items() if h is not None}
        axes.plot(list(at), list(at.values()), color=colour, marker=marker, label=name)
    first = min(fitting)
    start = factor * min(h for h in (hours.get(first) for hours in found.values()) if h is not None)
    every = sorted({gpus for hours in found.values() for gpus in hours})
    axes.plot(every, [start * first / n for n in every], ":", color=GREY, label="perfect scaling")
    axes.axvline(tasks[0].gpus, color=GREY, linewidth=0.8)
    axes.set_xscale("log", base=2)
    log_scale(axes, "y")
    axes.set_xticks(every, [str(n) for n in every], rotation=45 if len(every) > 9 else 0)
    axes.set_xlabel(f"GPUs ({tasks[0].device.name}); grey line: {_gpus(tasks[0].gpus)}, as in the bars")
    axes.set_ylabel(f"{unit}, the fastest micro-batch that fits")
    axes.legend()
