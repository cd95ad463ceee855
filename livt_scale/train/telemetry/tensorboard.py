"""TensorBoard files of a stage, RUN/STAGE/tensorboard: numbers in groups, the recipe, hyper-parameters, pictures.

    train/loss  train/lr  eval/top1_all  time/step_s  system/images_per_s …        scalars
    recipe                                                                         text
    reconstructions  confusion                                                     images

By accelerate's tracker. Events of steps that a resumed run repeats are purged, so that a resumed run is one run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.util.log import DiskWarning
from livt_scale.util.outside import read_checked

FOLDER = "tensorboard"
SYSTEM = ("images_per_s", "tflops", "mfu", "memory_peak_gib")
NO_CURVE = ("step", "world_size", "time", "slowest_rank", "slowest_host")  # fields of a line that no curve is drawn of
HPARAM_METRICS = ("train/loss", "eval/top1_all")  # columns of TensorBoard's table of hyper-parameters


def grouped(line: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields of a line of metrics.jsonl by the group in which trackers show them."""
    groups: dict[str, dict[str, Any]] = {"train": {}, "time": {}, "system": {}}
    for name, value in line.items():
        if name not in NO_CURVE:
            group = "system" if name in SYSTEM else "time" if name.endswith("_s") else "train"
            groups[group][name] = value
    return groups


class TensorBoard:
    """The files of one stage, open for writing. `purge_step`: events from this step on are dropped.

    After an error of the disk nothing more is written: the writer's thread has ended with it. Training continues.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        from accelerate import PartialState
        from accelerate.tracking import TensorBoardTracker

        PartialState(cpu=True)  # the tracker asks it for the main process; the process group exists already
        self._folder, self._failed = folder / FOLDER, False
        self._tracker = TensorBoardTracker(FOLDER, logging_dir=folder, purge_step=purge_step)
        self._unless_failed(self._tracker.start)

    def describe(self, recipe: Recipe, fields: Mapping[str, Any]) -> None:
        """Write the resolved recipe as text, and `fields`, dotted, as hyper-parameters of this very run."""
        self._unless_failed(lambda: self._describe(recipe, fields))

    def _describe(self, recipe: Recipe, fields: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer = self._tracker.writer
        writer.add_text("recipe", f"```yaml\n{to_yaml(recipe)}\n```")
        values = {name: _hparam(value) for name, value in fields.items() if value is not None}
        for summary in hparams(values, dict.fromkeys(HPARAM_METRICS, 0.0)):
            writer.file_writer.add_summary(summary)  # writer.add_hparams would start another run each time

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._unless_failed(lambda: self._tracker.log(values, step=step))

    def picture(self, name: str, path: Path, *, step: int) -> None:
        """Show the PNG file `path`, as it is."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        raw = read_checked(path, "image")
        width, height = struct.unpack(">II", raw[16:24])  # IHDR, the first chunk of every PNG
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=raw)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._unless_failed(lambda: self._tracker.writer.file_writer.add_summary(summary, step))

    def finish(self) -> None:
        self._unless_failed(self._tracker.finish)

    def _unless_failed(self, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed = True
            DiskWarning("later curves are missing")(self._folder, error)


def _hparam(value: Any) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else str(value)
