"""The files in which a run records what it does: one reader for each of them.

RUN/STAGE/status.json         read_status        state, position, process, earlier starts
RUN/STAGE/metrics.jsonl       read_metrics       one line per `log.every_steps` steps
RUN/STAGE/evaluations.jsonl   read_evaluations   one line per evaluation during training
RUN/STAGE/anomalies.jsonl     read_anomalies     one line per step that was not taken as it was
RUN/finetune/eval.json        read_eval          the report of the final evaluation
RUN/log.txt                   `livt logs`        what rank 0 printed, with date and time

The files are read while others write them, after a kill and on full disks. So an incomplete last line of a .jsonl file
is skipped, a field of the wrong kind counts as missing, and sizes are bounded. A damaged line is counted, or with
`strict` an error that names the file and the line. Needs no torch.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeGuard, TypeVar, cast

from livt_scale.util.errors import RunError
from livt_scale.util.outside import open_checked, parse_json
from livt_scale.util.text import first_line

State = Literal["running", "preempted", "failed", "done"]
STATUS, METRICS, EVALUATIONS, ANOMALIES = "status.json", "metrics.jsonl", "evaluations.jsonl", "anomalies.jsonl"
EVAL = "eval.json"
LOG = "log.txt"  # of the run: what rank 0 printed, start after start

TAIL_BYTES = 2**20  # what `tail` reads: thousands of lines
MAX_LINE_BYTES = 2**10  # of metrics.jsonl, where a number of lines is asked for: they have about 300
MAX_LINES_BYTES = 2**28  # a million lines
MAX_STATUS_BYTES = 2**20
MAX_EVAL_BYTES = 2**28  # per-class values of many thousand classes

Line = TypeVar("Line")


class StageStatus(TypedDict, total=False):
    """status.json. `state` is always there; times are local, with the offset from UTC."""

    state: State
    stage: str
    why: str
    since: str  # when the state changed
    at: str  # when the file was written
    step: int
    total_steps: int
    host: str
    pid: int
    starts: int
    history: list[dict[str, Any]]  # how earlier starts ended, the oldest first
    ranks: dict[str, Any]
    longest_save_s: float
    failed_saves: int
    last_failed_save: str


@dataclass(frozen=True)
class MetricsLine:
    """A line of metrics.jsonl (docs/telemetry.md). None: not in the line, or null."""

    step: int
    epoch: float | None
    loss: float | None
    images_per_s: float | None
    step_s: float | None
    data_wait_s: float | None
    evaluation_s: float | None
    checkpoint_stall_s: float | None
    mfu: float | None
    world_size: int | None
    lr: float | None = None
    memory_peak_gib: float | None = None


@dataclass(frozen=True)
class EvaluationLine:
    """A line of evaluations.jsonl: top-1 accuracy as fractions of 1; None: no class of the group was evaluated."""

    step: int
    epoch: float
    top1_all: float
    top1_many: float | None = None
    top1_medium: float | None = None
    top1_few: float | None = None


@dataclass(frozen=True)
class Lines(Generic[Line]):
    """The complete lines of a file in their order; `damaged`: how many more could not be read."""

    lines: list[Line]
    damaged: int = 0


def read_status(run_dir: Path, stage: str) -> StageStatus | None:
    """RUN/STAGE/status.json; None if the stage was never started. Raises RunError if the file cannot be read."""
    return read_status_file(run_dir / stage / STATUS)


def read_status_file(path: Path) -> StageStatus | None:
    status = _read_object(path, max_bytes=MAX_STATUS_BYTES, remedy="remove it")
    if status is None:
        return None
    if not isinstance(status.get("state"), str):
        raise RunError(f"{path} cannot be read: it has no state", remedy="remove it")

    kinds: dict[str, Callable[[object], bool]] = {
        **dict.fromkeys(("step", "total_steps", "pid", "starts", "longest_save_s", "failed_saves"), is_number),
        **dict.fromkeys(("stage", "why", "since", "at", "host", "last_failed_save"), lambda v: isinstance(v, str)),
        "history": lambda v: isinstance(v, list) and all(isinstance(entry, dict) for entry in v),
        "ranks": lambda v: isinstance(v, dict),
    }
    known = {name: value for name, value in status.items() if name not in kinds or kinds[name](value)}
    return cast(StageStatus, known)


def read_metrics(
    path: Path, *, tail: bool = False, last: int | None = None, strict: bool = False
) -> Lines[MetricsLine]:
    """The lines of a metrics.jsonl; with `tail` those at its end, of them the `last` ones.

    See `_read_lines` for errors.
    """
    tail_bytes = min(last * MAX_LINE_BYTES, TAIL_BYTES) if last else TAIL_BYTES
    return _read_lines(path, _metrics_line, tail_bytes=tail_bytes if tail else None, last=last, strict=strict)


def read_evaluations(path: Path) -> list[EvaluationLine]:
    """The lines of an evaluations.jsonl; none if there is no such file. Raises RunError for a damaged line."""
    if not path.exists():
        return []
    return _read_lines(path, _evaluation_line, tail_bytes=None, strict=True).lines


def read_anomalies(path: Path) -> Lines[dict[str, Any]]:
    """The last lines of an anomalies.jsonl; each has an integer `step`."""
    return _read_lines(path, lambda entry: {**entry, "step": _step(entry)}, tail_bytes=TAIL_BYTES, strict=False)


def read_eval(path: Path) -> dict[str, Any]:
    """The report in an eval.json. Raises RunError if it is missing or damaged."""
    again = f"write it again: livt eval {path.parent.parent} --temperature --out {path}"
    report = _read_object(path, max_bytes=MAX_EVAL_BYTES, remedy=again)
    if report is None:
        raise RunError(f"there is no {path}", remedy="fine-tuning has not finished, or the recipe has no data.val")
    return report


def training_seconds(lines: Sequence[MetricsLine]) -> float:
    """Time in steps: without start, evaluation and saving."""
    before = [0, *(line.step for line in lines)]
    return sum((line.step_s or 0.0) * (line.step - start) for line, start in zip(lines, before, strict=False))


def of_last_world(lines: Sequence[MetricsLine]) -> list[MetricsLine]:
    """Those that were written by as many ranks as the last one: a run may be resumed by fewer or more."""
    return [line for line in lines if line.world_size == lines[-1].world_size]


def step_seconds(lines: Sequence[MetricsLine]) -> float | None:
    """Seconds of a step, the median, with the evaluations and saves between two, the mean. None: not known."""
    timed = [(line, line.step_s) for line in lines if line.step_s is not None]
    if not timed:
        return None
    between = statistics.fmean((line.evaluation_s or 0.0) + (line.checkpoint_stall_s or 0.0) for line, _ in timed)
    return statistics.median(step_s for _, step_s in timed) + between


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line to a .jsonl file. Raises OSError, leaving no half of it: the next line would be damaged too."""
    line = (json.dumps(entry, ensure_ascii=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


def drop_lines_after(path: Path, step: int) -> None:
    """Cut a .jsonl file behind its last line up to `step`, in place, which needs no room on a full disk."""
    end = kept = 0
    with suppress(FileNotFoundError), open_checked(path, "log") as file:
        for line in file:
            end += len(line)
            with suppress(ValueError):  # damaged, or incomplete at the end
                if line.endswith(b"\n") and _step(_object(parse_json(line))) <= step:
                    kept = end
    if kept < end:
        os.truncate(path, kept)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value`, from JSON, is a finite number; true and false are not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _metrics_line(entry: dict[str, Any]) -> MetricsLine:
    names = (
        "epoch", "loss", "lr", "images_per_s", "step_s", "data_wait_s", "evaluation_s", "checkpoint_stall_s", "mfu",
        "memory_peak_gib",
    )  # fmt: skip
    ranks = entry.get("world_size")
    numbers = {name: float(entry[name]) if is_number(entry.get(name)) else None for name in names}
    return MetricsLine(step=_step(entry), world_size=int(ranks) if is_number(ranks) else None, **numbers)


def _evaluation_line(entry: dict[str, Any]) -> EvaluationLine:
    names = ("top1_many", "top1_medium", "top1_few")
    groups = {name: float(entry[name]) if is_number(entry.get(name)) else None for name in names}
    return EvaluationLine(_step(entry), _required(entry, "epoch"), _required(entry, "top1_all"), **groups)


def _step(entry: dict[str, Any]) -> int:
    return int(_required(entry, "step"))


def _required(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if not is_number(value):
        raise ValueError(f"it has no number {name!r}")
    return float(value)


def _read_lines(
    path: Path,
    parse: Callable[[dict[str, Any]], Line],
    *,
    tail_bytes: int | None,
    strict: bool,
    last: int | None = None,
) -> Lines[Line]:
    """`parse` of each line that it accepts, or of the `last` in the last `tail_bytes`. RunError: it cannot be read.

    strict: a missing file, a damaged line, and a file whose only line is incomplete are errors too.
    """
    end = _read_end(path, max_bytes=tail_bytes or MAX_LINES_BYTES)
    if end is None:
        if strict:
            raise RunError(f"there is no {path}")
        return Lines([])
    raw, cut = end
    if cut and tail_bytes is None:
        raise RunError(f"{path} has more than {MAX_LINES_BYTES / 2**20:.0f} MiB and is not read")
    texts = raw.split(b"\n")
    first = max(int(cut), len(texts) - 1 - last if last else 0)  # after the last line is an empty text, or half a line
    lines, damaged = [], 0
    for number, text in list(enumerate(texts, start=1))[first:]:
        if not text.strip():
            continue
        try:
            lines.append(parse(_object(parse_json(text))))
        except ValueError as error:
            incomplete = number == len(texts)  # being written, or cut by a kill
            if strict and not (incomplete and lines):
                raise RunError(f"{path}, line {number} cannot be read: {first_line(error)}") from error
            damaged += not incomplete
    return Lines(lines, damaged)


def _read_end(path: Path, *, max_bytes: int) -> tuple[bytes, bool] | None:
    """(the last `max_bytes` of a file, whether that cuts it); None if there is no such file."""
    try:
        with open_checked(path, "log") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - max_bytes, 0))
            return file.read(max_bytes), size > max_bytes
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}", remedy="remove it") from error


def _read_object(path: Path, *, max_bytes: int, remedy: str) -> dict[str, Any] | None:
    """The JSON object in a file; None without one."""
    end = _read_end(path, max_bytes=max_bytes)
    if end is None:
        return None
    raw, cut = end
    if cut:
        raise RunError(f"{path} cannot be read: it has more than {max_bytes / 2**20:.0f} MiB", remedy=remedy)
    try:
        return _object(parse_json(raw))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {first_line(error)}", remedy=remedy) from error


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
