"""How far a stage is, by the files that it has written: status.json, heartbeats, metrics.jsonl, anomalies, checkpoints.

A run directory is looked at from outside while others write it, after kills and on full disks. So whatever is missing,
half written or damaged becomes a line of `damage`, and the rest is told all the same. Files that grow are read from
their end, TAIL_BYTES at most.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from livt_scale.checkpoint.catalog import damages
from livt_scale.checkpoint.manifest import MANIFEST, step_of
from livt_scale.config.recipe import STAGES
from livt_scale.slurm.commands import seconds
from livt_scale.train import heartbeat
from livt_scale.train.heartbeat import Heartbeat

TAIL_BYTES = 2**20
MEASURED_LINES = 50  # of metrics.jsonl: what a step takes now, and not a week ago
MIN_FRESH_S = 60.0
FRESH_BEATS = 4  # heartbeats that may be missed before a run counts as silent
HEARTBEAT_S = 5.0  # where recipe.yaml does not say
MAX_RANKS = 65536


@dataclass(frozen=True)
class Saved:
    """The newest whole checkpoint, by sizes; `at` in seconds since 1970."""

    name: str
    step: int
    at: float


@dataclass
class Plan:
    """What recipe.yaml says of the run, as far as it can be read."""

    name: str = ""
    stages: dict[str, int | None] = field(default_factory=dict)  # epochs of each, in their order
    fresh_s: float = MIN_FRESH_S
    evaluates: bool = False  # it has a data.val


@dataclass
class Record:
    """What one stage has written."""

    stage: str
    status: dict[str, Any] = field(default_factory=dict)  # empty: never started, or it cannot be read
    beats: list[Heartbeat] = field(default_factory=list)  # of this start
    lines: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, its end
    anomalies: list[dict[str, Any]] = field(default_factory=list)
    saved: Saved | None = None
    damage: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        return _text(self.status.get("state"))

    @property
    def since(self) -> float | None:
        return seconds(_text(self.status.get("since")))

    @property
    def wrote_at(self) -> float | None:
        """The last sign of life of any rank."""
        told = [*(beat.at for beat in self.beats if beat.state == "running"), seconds(_text(self.status.get("at")))]
        return max((at for at in told if at is not None), default=None)

    @property
    def step(self) -> int:
        """The furthest that any of its files tells of."""
        told = [self.status.get("step"), *(beat.step for beat in self.beats)]
        last = self.lines[-1].get("step") if self.lines else None
        return max((int(n) for n in (*told, last) if is_number(n)), default=0)

    @property
    def total(self) -> int | None:
        total = self.status.get("total_steps")
        return int(total) if is_number(total) else None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step now, with the evaluations and saves between: the median of the last lines."""
        same = [line for line in self.lines if line.get("world_size") == self.lines[-1].get("world_size")]
        recent = [line for line in same[-MEASURED_LINES:] if is_number(line.get("step_s"))]
        if not recent:
            return None
        between = [sum(_number(line.get(k)) for k in ("evaluation_s", "checkpoint_stall_s")) for line in recent]
        return statistics.median(float(line["step_s"]) for line in recent) + statistics.fmean(between)

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
        or any((path / stage / "status.json").is_file() for stage in STAGES)
    )


def read_plan(run_dir: Path) -> tuple[Plan, list[str]]:
    """(what recipe.yaml says, what is wrong with it). Without one, all stages that have a folder."""
    there: dict[str, int | None] = {stage: None for stage in STAGES if (run_dir / stage).is_dir()}
    path = next((p for p in _recipes(run_dir) if p.is_file()), None)
    if path is None:
        return Plan(run_dir.name, there), []
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
        parts = {stage: part for stage in STAGES if isinstance(part := tree["stages"].get(stage), dict)}
    except (OSError, yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        return Plan(run_dir.name, there), [f"{path} cannot be read: {_first_line(error)}"]
    beat_s = (tree.get("faults") or {}).get("heartbeat_s") if isinstance(tree.get("faults"), dict | None) else None
    fresh_s = max(MIN_FRESH_S, FRESH_BEATS * (float(beat_s) if is_number(beat_s) else HEARTBEAT_S))
    epochs: dict[str, int | None] = {
        s: int(p["epochs"]) if is_number(p.get("epochs")) else None for s, p in parts.items()
    }
    evaluates = isinstance(tree.get("data"), dict) and bool(tree["data"].get("val"))
    return Plan(_text(tree.get("name")) or run_dir.name, epochs or there, fresh_s, evaluates), []


def _recipes(run_dir: Path) -> Iterable[Path]:
    """The resolved one; before the first start, the one that was submitted."""
    yield run_dir / "recipe.yaml"
    with suppress(OSError):
        frozen = [(p.stat().st_mtime, p) for p in (run_dir / "code").glob("*/recipe.yaml")]
        yield from (p for _, p in sorted(frozen, reverse=True))
    yield run_dir / "slurm" / "recipe.yaml"


def read_record(run_dir: Path, stage: str) -> Record:
    """What `stage` has written. Raises nothing: what cannot be read is told in `damage`."""
    folder, record = run_dir / stage, Record(stage)
    try:
        status = json.loads((folder / "status.json").read_bytes())
        if not isinstance(status, dict) or not isinstance(status.get("state"), str):
            raise ValueError("it has no state")
        record.status = status
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        record.damage.append(f"{folder / 'status.json'} cannot be read: {_first_line(error)}")
    record.lines = _json_lines(folder / "metrics.jsonl", needs="step", damage=record.damage)
    record.anomalies = _json_lines(folder / "anomalies.jsonl", needs="step", damage=record.damage)
    record.beats = _beats(folder, since=record.since if record.state == "running" else None)
    record.saved = _newest(folder / "checkpoints", damage=record.damage)
    return record


def _beats(folder: Path, *, since: float | None) -> list[Heartbeat]:
    """The last word of each rank; of a stage that runs, without ranks that an earlier start had."""
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


def _json_lines(path: Path, *, needs: str, damage: list[str]) -> list[dict[str, Any]]:
    """The whole lines at the end of a file. A half one at the very end is being written, or of a killed process."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - TAIL_BYTES, 0))
            raw = file.read()
    except FileNotFoundError:
        return []
    except OSError as error:
        damage.append(f"{path} cannot be read: {error.strerror}")
        return []
    whole = raw.split(b"\n")[1 if size > TAIL_BYTES else 0 : -1]
    found, wrong = [], 0
    for line in whole:
        try:
            entry = json.loads(line)
            int(entry[needs])
            found.append(entry)
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            wrong += 1
    if wrong:
        damage.append(f"{wrong} lines of {path} cannot be read and are left out")
    return found


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


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sampled(values: Sequence[float], *, count: int) -> list[float]:
    """At most `count` means over `values`, in their order: what a line of so many characters can show."""
    if len(values) <= count:
        return list(values)
    edges = [i * len(values) // count for i in range(count + 1)]
    return [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]


def _number(value: object) -> float:
    return float(value) if is_number(value) else 0.0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _first_line(error: BaseException) -> str:
    told = error.strerror if isinstance(error, OSError) else str(error)
    return (told or type(error).__name__).splitlines()[0][:200]
