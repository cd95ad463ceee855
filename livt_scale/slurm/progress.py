"""How far a stage is, by the files that it has written: status.json, heartbeats, metrics.jsonl, anomalies, checkpoints.

A run directory is looked at from outside while others write it, after kills and on full disks. So whatever is missing,
incomplete or damaged becomes a line of `damage`, and the rest is reported all the same.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

try:  # 10 times faster; there where PyYAML was built with libyaml, as its wheels are
    from yaml import CSafeLoader as YamlLoader
except ImportError:
    from yaml import SafeLoader as YamlLoader  # type: ignore[assignment]

from livt_scale.checkpoint.catalog import damages
from livt_scale.checkpoint.manifest import MANIFEST, step_of
from livt_scale.config.recipe import STAGES
from livt_scale.config.renamed import translate
from livt_scale.slurm.commands import seconds
from livt_scale.train import heartbeat
from livt_scale.train.heartbeat import Heartbeat
from livt_scale.train.run_files import (
    ANOMALIES,
    METRICS,
    STATUS,
    Lines,
    MetricsLine,
    StageStatus,
    is_number,
    of_last_world,
    read_anomalies,
    read_metrics,
    read_status,
    step_seconds,
)
from livt_scale.util.errors import RunError
from livt_scale.util.outside import read_checked

MEASURED_LINES = 50  # of metrics.jsonl: what a step takes now, and not a week ago
MIN_FRESH_S = 60.0
FRESH_BEATS = 4  # heartbeats that may be missed before a run counts as silent
HEARTBEAT_S = 5.0  # if recipe.yaml does not have it
MAX_RANKS = 65536
MAX_DEPTH = 100  # of a recipe; libyaml's loader calls itself for each level, and would overflow the C stack

Line = TypeVar("Line")


@dataclass(frozen=True)
class Saved:
    """The newest complete checkpoint, by sizes; `at` in seconds since 1970."""

    name: str
    step: int
    at: float


@dataclass
class RunPlan:
    """The run as recipe.yaml describes it, as far as it can be read."""

    name: str = ""
    stages: dict[str, int | None] = field(default_factory=dict)  # epochs of each, in their order
    fresh_s: float = MIN_FRESH_S
    evaluates: bool = False  # it has a data.val


@dataclass
class Record:
    """What one stage has written."""

    stage: str
    status: StageStatus = field(default_factory=lambda: StageStatus())  # empty: never started, or it cannot be read
    beats: list[Heartbeat] = field(default_factory=list)  # of this start
    lines: list[MetricsLine] = field(default_factory=list)  # the last ones of metrics.jsonl
    anomalies: list[dict[str, Any]] = field(default_factory=list)
    saved: Saved | None = None
    damage: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        return self.status.get("state", "")

    @property
    def since(self) -> float | None:
        return seconds(self.status.get("since", ""))

    @property
    def wrote_at(self) -> float | None:
        """The last sign of life of any rank."""
        told = [*(beat.at for beat in self.beats if beat.state == "running"), seconds(self.status.get("at", ""))]
        return max((at for at in told if at is not None), default=None)

    @property
    def step(self) -> int:
        """The furthest step in any of its files."""
        steps = [self.status.get("step", 0), *(beat.step for beat in self.beats), *(x.step for x in self.lines[-1:])]
        return max(0, *map(int, steps))

    @property
    def total(self) -> int | None:
        total = self.status.get("total_steps")
        return int(total) if total is not None else None

    @property
    def step_s(self) -> float | None:
        """Of a step now, with the evaluations and saves between, by the last lines."""
        timed = [line for line in of_last_world(self.lines) if line.step_s is not None]
        return step_seconds(timed[-MEASURED_LINES:])

    @property
    def to_finish_s(self) -> float | None:
        if self.total is None or self.step_s is None:
            return None
        return max(self.total - self.step, 0) * self.step_s


def is_run(path: Path) -> bool:
    """Whether `path` holds a run, begun or only submitted."""
    return (
        (path / "recipe.yaml").is_file()
        or (path / "slurm" / "chain.json").is_file()
        or any((path / stage / STATUS).is_file() for stage in STAGES)
    )


def read_plan(run_dir: Path) -> tuple[RunPlan, list[str]]:
    """(the plan in recipe.yaml, what is wrong with it). Without one, all stages that have a folder."""
    there: dict[str, int | None] = {stage: None for stage in STAGES if (run_dir / stage).is_dir()}
    path = next((p for p in _recipes(run_dir) if p.is_file()), None)
    if path is None:
        return RunPlan(run_dir.name, there), []
    try:
        tree = translate(_tree(read_checked(path, "recipe").decode(errors="replace")))
        parts = {stage: part for stage in STAGES if isinstance(part := tree["stages"].get(stage), dict)}
    except (OSError, yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        return RunPlan(run_dir.name, there), [f"{path} cannot be read: {_first_line(error)}"]
    beat_s = (tree.get("faults") or {}).get("heartbeat_s") if isinstance(tree.get("faults"), dict | None) else None
    fresh_s = max(MIN_FRESH_S, FRESH_BEATS * (float(beat_s) if is_number(beat_s) else HEARTBEAT_S))
    epochs: dict[str, int | None] = {
        s: int(p["epochs"]) if is_number(p.get("epochs")) else None for s, p in parts.items()
    }
    evaluates = isinstance(tree.get("data"), dict) and bool(tree["data"].get("val"))
    return RunPlan(_text(tree.get("name")) or run_dir.name, epochs or there, fresh_s, evaluates), []


def _tree(text: str) -> Any:
    """What the YAML `text` holds. Raises yaml.YAMLError, ValueError."""
    depth = 0
    for event in yaml.parse(text, Loader=YamlLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return yaml.load(text, Loader=YamlLoader)


def _recipes(run_dir: Path) -> Iterable[Path]:
    """The resolved one; before the first start, the one that was submitted."""
    yield run_dir / "recipe.yaml"
    yield run_dir / "slurm" / "submitted.yaml"


def read_record(run_dir: Path, stage: str, *, brief: bool = False) -> Record:
    """What `stage` has written. Raises nothing: what cannot be read is in `damage`. brief: few lines of metrics."""
    folder, record = run_dir / stage, Record(stage)
    try:
        record.status = read_status(run_dir, stage) or StageStatus()
    except RunError as error:
        record.damage.append(error.message)
    last = MEASURED_LINES if brief else None
    record.lines = _undamaged(
        folder / METRICS, lambda path: read_metrics(path, tail=True, last=last), damage=record.damage
    )
    record.anomalies = _undamaged(folder / ANOMALIES, read_anomalies, damage=record.damage)
    record.beats = _beats(folder, since=record.since if record.state == "running" else None)
    record.saved = _newest(folder / "checkpoints", damage=record.damage)
    return record


def _beats(folder: Path, *, since: float | None) -> list[Heartbeat]:
    """The last heartbeat of each rank; of a running stage, without ranks that only an earlier start had."""
    numbers = [0]
    with suppress(OSError):
        names = [re.fullmatch(r"rank-(\d{1,5})\.json", path.name) for path in (folder / heartbeat.FOLDER).iterdir()]
        numbers += [int(found[1]) for found in names if found]
    beats: list[Heartbeat] = []
    with suppress(RecursionError):  # a file of brackets
        beats = heartbeat.read(folder, world_size=min(max(numbers) + 1, MAX_RANKS))
    beats = [b for b in beats if all(is_number(n) for n in (b.at, b.since, b.step, b.pid, b.rank))]
    beats = [b for b in beats if all(isinstance(word, str) for word in (b.host, b.state, b.phase, b.why))]
    return [beat for beat in beats if since is None or beat.at >= since - MIN_FRESH_S]


def _undamaged(path: Path, read: Callable[[Path], Lines[Line]], *, damage: list[str]) -> list[Line]:
    try:
        found = read(path)
    except RunError as error:
        damage.append(error.message)
        return []
    if found.damaged:
        damage.append(f"{found.damaged} lines of {path} cannot be read and are left out")
    return found.lines


def _newest(folder: Path, *, damage: list[str]) -> Saved | None:
    try:
        names = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    except FileNotFoundError:
        return None
    except OSError as error:
        damage.append(f"{folder} cannot be read: {error.strerror}")
        return None
    for step, path in sorted(names, reverse=True):
        try:
            wrong = damages(path, quick=True)
            if not wrong:
                return Saved(path.name, step, (path / MANIFEST).stat().st_mtime)
            damage.append(f"{path} is damaged: {'; '.join(wrong)}")
        except FileNotFoundError:  # pruned while it was looked at
            continue
        except (OSError, RecursionError) as error:
            damage.append(f"{path} cannot be read: {_first_line(error)}")
    return None


def sampled(values: Sequence[float], *, count: int) -> list[float]:
    """At most `count` means over `values`, in their order: what a line of that many characters can show."""
    if len(values) <= count:
        return list(values)
    edges = [i * len(values) // count for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _first_line(error: BaseException) -> str:
    told = error.strerror if isinstance(error, OSError) else str(error)
    return (told or type(error).__name__).splitlines()[0][:200]
