"""How far a stage of a run is and how long its steps take, from what the run itself has written.

step_s      by the last lines of RUN/STAGE/metrics.jsonl of as many ranks as the last one, less the first, which starts
            slowly; with the evaluations and saves between two steps
save_s      `longest_save_s` of RUN/STAGE/status.json
total       `total_steps` of status.json; before the first start, from the shards' manifest
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.data.order.for_stage import planned_steps
from livt_scale.train.run_files import METRICS, StageStatus, of_last_world, read_metrics, read_status, step_seconds

LINES = 200


@dataclass(frozen=True)
class Measured:
    """What is known of one stage. None: not known yet."""

    done: bool = False
    step: int = 0
    total: int | None = None
    step_s: float | None = None
    longest_step_s: float | None = None
    save_s: float | None = None
    world_size: int | None = None  # with which step_s was measured
    planned_step_s: float | None = None  # by livt plan, at the high end, where nothing was measured


def measure(recipe: Recipe, stage: Stage, run_dir: Path) -> Measured:
    """The measurements of `stage` in the run directory. Raises RunError if its status.json cannot be read."""
    status: StageStatus = read_status(run_dir, stage) or {}
    read = of_last_world(read_metrics(run_dir / stage / METRICS, tail=True).lines)
    lines = [line for line in read if line.step_s is not None][-LINES:]
    lines = lines[1:] or lines
    total = status.get("total_steps")
    return Measured(
        done=status.get("state") == "done",
        step=int(status.get("step") or 0),
        total=int(total) if total is not None else planned_steps(recipe, stage),
        step_s=step_seconds(lines),
        longest_step_s=max((line.step_s for line in lines if line.step_s is not None), default=None),
        save_s=status.get("longest_save_s"),
        world_size=lines[-1].world_size if lines else None,
    )
