"""The classifier of a run directory or of an export, whichever a path is."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.checkpoint.tensor_file import read_safetensors
from livt_scale.config.load import load_saved
from livt_scale.data.classes import TrainingClasses
from livt_scale.models.classifier import AnyClassifier
from livt_scale.models.parameter_efficient import build_tuned
from livt_scale.train.export_info import ADAPTER, CONFIG, WEIGHTS, ExportInfo, identity, is_export, read_info
from livt_scale.train.load_trained import Trained, Weights, load_trained, pick_checkpoint
from livt_scale.train.run_dir import is_run
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.util.outside import sha256_of


def open_trained(path: Path, *, which: str | None = None, weights: Weights = "raw") -> Trained:
    """The classifier of a run directory or of an export. Raises UsageError where `path` is neither."""
    if is_run(path):
        return load_trained(path, which=which, weights=weights)
    if not is_export(path):
        raise UsageError(
            f"{path} is neither a run nor an export",
            remedy=f"a run holds recipe.yaml and finetune/, an export {CONFIG} and {WEIGHTS}",
        )
    if which is not None:
        raise UsageError(
            f"checkpoint {which!r}: {path} is an export and has one set of weights", remedy="leave checkpoint out"
        )
    if weights != "raw":
        raise UsageError(
            f"weights {weights!r}: {path} is an export and has one set of weights",
            remedy="leave weights out, and choose them when exporting",
        )
    model, info = load_export(path)
    classes = TrainingClasses(info.class_names, info.class_counts, where=str(path), group_counts=info.group_counts)
    lineage = dict(info.lineage)
    learnt_from = lineage.pop("learnt_from", {})
    return Trained(model, info.recipe(path), classes, lineage, learnt_from, info.calibration, tuning=info.tuning)


def load_export(folder: Path) -> tuple[AnyClassifier, ExportInfo]:
    """The classifier in `folder`, on the CPU in evaluation mode, every byte of its weights checked.

    Raises ExportError naming the file: absent, of another version, damaged, or not of the model that config.json says.
    """
    info = read_info(folder)
    path = folder / WEIGHTS
    if info.weights.name != WEIGHTS:
        reader = "peft" if info.weights.name == ADAPTER else "onnxruntime"
        raise ExportError(f"{folder} is an export for {reader}", remedy="export the run with --to timm as well")
    remedy = "copy the export again, or write it again with `livt export`"
    try:
        size = path.stat().st_size
        if size != info.weights.bytes or sha256_of(path) != info.weights.sha256:
            raise ExportError(f"{path} was cut or changed: it is not what {CONFIG} says", remedy=remedy)
        tensors, _ = read_safetensors(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}", remedy=remedy) from error
    with torch.random.fork_rng(devices=[]):
        model = build_tuned(
            info.model,
            num_classes=len(info.class_names),
            drop_path=0.0,
            tuning=info.tuning,
            cosine_scale=info.cosine_scale,
        ).eval()
    wrong = _misfits(tensors, model.state_dict())
    if wrong:
        raise ExportError(f"{path} does not fit the model in {CONFIG}: {'; '.join(wrong[:5])}", remedy=remedy)
    model.load_state_dict(tensors)
    return model, info


def evaluation_set(path: Path, trained: Trained) -> str | None:
    """The evaluation set of the run at `path`, from which `trained` was read; None: it has none, or is an export."""
    if not is_run(path):
        return None
    saved = path / "recipe.yaml"  # newer than the checkpoint's, where the run was moved and continued
    recipe = load_saved(saved) if saved.is_file() else trained.recipe
    return recipe.data.val


def run_of(path: Path, *, which: str | None = None) -> str:
    """What identifies the run that the weights in `path`, a run or an export, are of. Raises LivtError."""
    if is_run(path):
        facts = read_manifest(pick_checkpoint(path, which=which)).facts
        return str(facts.get("run") or facts["recipe_digest"])
    return identity(read_info(path).lineage)[0]


def _misfits(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} has no place" for name in tensors if name not in wanted]
    return wrong + [
        f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
