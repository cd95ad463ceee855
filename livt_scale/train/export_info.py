"""The facts about an export: the part `livt` of its config.json, and whose weights it holds.

    info = read_info(Path("exports/try"))
    info.class_names, info.mean, info.lineage["checkpoint"]

Classes and their training counts, loss, pixel statistics, and the origin of the weights (run, checkpoint, position,
evaluation set). No path and no date: the same weights give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, ValidationError, model_validator

from livt_scale.config.data import PixelMean, PixelStd
from livt_scale.config.recipe import Data, Finetune, Model, Parallel, Recipe, Stages
from livt_scale.config.stages import AnyLoss
from livt_scale.config.tuning import AnyTuning, TrainAll
from livt_scale.evaluation.calibration import Calibration
from livt_scale.extensions import load_extensions
from livt_scale.util.choices import mistake_in_saved
from livt_scale.util.errors import ExportError
from livt_scale.util.outside import read_json, sha256_of

WEIGHTS = "model.safetensors"
ONNX, ONNX_DATA = "model.onnx", "model.onnx.data"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONFIG = "config.json"
FILES = (WEIGHTS, ONNX, ONNX_DATA, ADAPTER, ADAPTER_CONFIG, CONFIG)  # those that an export consists of, or some


class WeightsFile(BaseModel):
    """The file that holds the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["model.safetensors", "model.onnx", "model.onnx.data", "adapter_model.safetensors"]
    bytes: NonNegativeInt
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls.model_validate({"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})


class ModelFacts(BaseModel):
    """What a reader of an export may want to know of the model, in whatever file its weights are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["livt-export"] = "livt-export"
    version: Literal[1] = 1
    model: Model
    class_names: tuple[str, ...]
    class_counts: tuple[NonNegativeInt, ...]  # of the training set, without its quarantine
    group_counts: tuple[NonNegativeInt, ...] | None = None  # of what decides the groups; None: class_counts do
    mean: tuple[PixelMean, ...]  # of the pixels in [0, 1]
    std: tuple[PixelStd, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of resized images
    crop_pct: float | None = None  # as data.crop_pct of a recipe
    many_over: int
    few_under: int
    precision: Literal["fp32", "bf16", "fp16"]  # of the forward pass in training and evaluation; the weights are fp32
    loss: AnyLoss
    cosine_scale: PositiveFloat | None = None  # of a cosine head; None: the head is linear
    calibration: Calibration  # of the logits
    tuning: AnyTuning = TrainAll()  # what is left of `stages.finetune.train` in the weights, where it is not merged
    lineage: dict[str, Any]

    @model_validator(mode="after")
    def _every_class_has_a_count(self) -> Self:
        for name in ("class_counts", "group_counts"):
            counts = getattr(self, name)
            if counts is not None and len(self.class_names) != len(counts):
                raise ValueError(f"{len(self.class_names)} class_names for {len(counts)} {name}")
        return self

    def recipe(self, folder: Path) -> Recipe:
        """What evaluating this model needs of a recipe; its training data are not known here."""
        pixels = {name: getattr(self, name) for name in ("mean", "std", "interpolation", "crop_pct")}
        data = Data(train=str(folder), **pixels, many_over=self.many_over, few_under=self.few_under)
        head: dict[str, Any] = {"head": "cosine", "head_scale": self.cosine_scale} if self.cosine_scale else {}
        plain = {"layer_decay": 1.0, "drop_path": 0.0, "smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}
        stages = Stages(finetune=Finetune(init="scratch", loss=self.loss, **plain, **head))
        parallel = Parallel(precision=self.precision)
        return Recipe(name="export", data=data, model=self.model, stages=stages, parallel=parallel)


class ExportInfo(ModelFacts):
    """The part `livt` of config.json."""

    weights: WeightsFile


def is_export(path: Path) -> bool:
    """Whether config.json in `path` is marked as ours; nothing else is checked."""
    try:
        part = read_json(path / CONFIG, "description of weights").get("livt")
        return bool(part.get("format") == "livt-export")
    except (OSError, ValueError, AttributeError):
        return False


def read_info(folder: Path) -> ExportInfo:
    """The part `livt` of `folder`'s config.json. Raises ExportError."""
    path = folder / CONFIG
    if not is_export(folder):
        raise ExportError(f"{path} is not of an export by livt", remedy="write one with `livt export RUN --out DIR`")
    load_extensions()
    try:
        return ExportInfo.model_validate(read_json(path, "description of weights")["livt"])
    except ValidationError as error:
        why, remedy = mistake_in_saved(error)
        raise ExportError(f"{path}: livt: {why}", remedy=remedy) from None


def identity(lineage: Mapping[str, Any]) -> tuple[str, str | None]:
    """(the run that weights are of, the method that changed them after training; None: none did)."""
    baseline = lineage.get("baseline") or {}
    return str(lineage.get("run") or lineage.get("recipe_digest")), baseline.get("method")
