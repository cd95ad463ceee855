"""TensorBoard, wandb and mlflow, by accelerate's trackers. A resumed run stays one run in each of them.

    RUN/STAGE/tensorboard     always, unless log.tensorboard is false; steps that are repeated are purged
    RUN/trackers.json         {"wandb": {"pretrain": "4f1c20e9"}}: the run ids by which a resumed stage continues

wandb and mlflow may wait for a server, so each has its own thread: training hands over its lines and continues. The
first line that a tracker refuses is logged; metrics.jsonl has all of them. Keys and passwords stay where these
libraries look for them (their environment, ~/.netrc): none is written into the run directory. Sent are the resolved
recipe and the lines.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from livt_scale.config.recipe import Log, Recipe, Stage
from livt_scale.train.telemetry.tensorboard import TensorBoard
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import UsageError
from livt_scale.util.outside import read_json, real_path

START_S = 120.0  # for a server to answer at the start
FINISH_S = 120.0  # for what is still to be sent at the end
MAX_WAITING = 10_000  # lines; further ones are dropped, which is logged
IDS = "trackers.json"
_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What is used of accelerate's `GeneralTracker`."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def check_installed(log: Log) -> None:
    """UsageError if a tracker that the recipe asks for is not installed."""
    for name in log.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"log.trackers asks for {name}, which is not installed",
                remedy=f"install it (pip install {name}), or take it out of log.trackers",
            )


class Trackers:
    """All trackers of one stage, on the main rank."""

    def __init__(self, trackers: list[Tracker], *, sent_to: int = 0) -> None:
        """`sent_to`: the step up to which an earlier start has sent lines to those that cannot take them back."""
        self._trackers, self._sent_to = trackers, sent_to

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        """Send the numbers among `values`, those of a nested mapping as `outer/inner`."""
        numbers = dict(_numbers(values))
        for tracker in self._trackers:
            if step > self._sent_to or not isinstance(tracker, InBackground):
                tracker.log(numbers, step=step)

    def picture(self, name: str, path: Path, *, step: int) -> None:
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoard):
                tracker.picture(name, path, step=step)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def open_trackers(recipe: Recipe, stage: Stage, *, run_dir: Path, start_step: int, sent_to: int) -> Trackers:
    """Start the trackers of the recipe. UsageError if one does not start: no login, no server, no such run."""
    trackers: list[Tracker] = []
    if recipe.log.tensorboard:
        board = TensorBoard(run_dir / stage, purge_step=start_step + 1)
        board.describe(recipe, dict(_flat(recipe.model_dump(mode="json"))))
        trackers.append(board)
    starts = {"wandb": _start_wandb, "mlflow": _start_mlflow}
    for name in recipe.log.trackers:
        ids = _read_ids(run_dir)
        known = ids.get(name, {}).get(stage)
        background = InBackground(name, lambda name=name, known=known: starts[name](recipe, stage, run_dir, known))  # type: ignore[misc]
        trackers.append(background)
        if background.run_id != known:
            ids.setdefault(name, {})[stage] = background.run_id
            write_atomic(run_dir / IDS, (json.dumps(ids, indent=2) + "\n").encode())
    return Trackers(trackers, sent_to=sent_to)


class InBackground:
    """A tracker whose calls are made by one thread, in their order; `log` never waits."""

    def __init__(self, name: str, start: Callable[[], tuple[Tracker, str]]) -> None:
        self._name = name
        self._lines: queue.Queue[tuple[dict[str, Any], int | None] | None] = queue.Queue(MAX_WAITING)
        self._started: queue.Queue[str | Exception] = queue.Queue()
        self._complained = False
        self._thread = threading.Thread(target=self._work, args=(start,), name=f"livt-{name}", daemon=True)
        self._thread.start()
        try:
            outcome = self._started.get(timeout=START_S)
        except queue.Empty:
            outcome = TimeoutError(f"no answer within {START_S:.0f} s")
        if isinstance(outcome, Exception):
            raise UsageError(
                f"{name} does not start: {type(outcome).__name__}: {outcome}", remedy=REMEDIES.get(name, "")
            ) from outcome
        self.run_id = outcome

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        try:
            self._lines.put_nowait((values, step))
        except queue.Full:
            self._complain(f"{MAX_WAITING} lines wait for it; the next ones are dropped")

    def finish(self) -> None:
        """Send what is waiting, for FINISH_S at most, and end."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=FINISH_S)
        self._thread.join(FINISH_S)
        if self._thread.is_alive():
            _log.warning("%s has not taken all lines within %.0f s; metrics.jsonl has them", self._name, FINISH_S)

    def _work(self, start: Callable[[], tuple[Tracker, str]]) -> None:
        try:
            tracker, run_id = start()
        except Exception as error:
            self._started.put(error)
            return
        self._started.put(run_id)
        while (line := self._lines.get()) is not None:
            try:
                tracker.log(line[0], step=line[1])
            except Exception as error:
                self._complain(f"{type(error).__name__}: {error}; the line of step {line[1]} is missing there")
        try:
            tracker.finish()
        except Exception as error:
            self._complain(f"{type(error).__name__}: {error}, at its end")

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("%s: %s (logged once)", self._name, text)


REMEDIES = {
    "wandb": "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
    "mlflow": "check that MLFLOW_TRACKING_URI is a server that answers, or unset it for files in the run directory",
}


def _start_wandb(recipe: Recipe, stage: Stage, run_dir: Path, known: str | None) -> tuple[Tracker, str]:
    from accelerate import PartialState
    from accelerate.tracking import WandBTracker

    PartialState(cpu=True)
    run_id = known or secrets.token_hex(8)
    tracker = WandBTracker(
        recipe.log.tracker_project,
        id=run_id,
        resume="allow",  # the same run where the server (or a later sync) knows it, else a new one
        name=f"{recipe.name}/{stage}",
        group=recipe.name,
        dir=str(run_dir / stage),
        settings={"disable_git": True, "save_code": False, "console": "off"},  # a remote's URL may hold a token
    )
    tracker.start()
    tracker.store_init_configuration(recipe.model_dump(mode="json"))
    return tracker, run_id


def _start_mlflow(recipe: Recipe, stage: Stage, run_dir: Path, known: str | None) -> tuple[Tracker, str]:
    import mlflow
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker

    PartialState(cpu=True)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{real_path(run_dir / 'mlflow.db')}")
    tracker = MLflowTracker(recipe.log.tracker_project, run_id=known, run_name=f"{recipe.name}/{stage}")
    tracker.start()
    if known is None:  # mlflow refuses to change a parameter, and a resumed recipe may differ in harmless ones
        tracker.store_init_configuration(dict(_flat(recipe.model_dump(mode="json"))))
    return tracker, tracker.tracker.info.run_id


def _read_ids(run_dir: Path) -> dict[str, dict[str, str]]:
    try:
        ids: dict[str, dict[str, str]] = read_json(run_dir / IDS, "record")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{run_dir / IDS} cannot be read: {error}",
            remedy="remove it: the stages then start new runs in wandb and mlflow",
        ) from error
    return ids


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    return [(name, value) for name, value in _flat(values, prefix, "/") if isinstance(value, int | float)]


def _flat(values: Mapping[str, Any], prefix: str = "", joint: str = ".") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}{joint}", joint)
        else:
            found.append((f"{prefix}{name}", value))
    return found
