"""Writes a trained model as two files for other tools: `model.safetensors` and `config.json`. No pickle, no recipe.

    livt export runs/try --out exports/try

`config.json` is timm's, with one part of ours (`export_info`). An export is written atomically, and only after timm has
built it from the temporary folder and reproduced the logits of the live model. It replaces an older export of the same
run; one of another run only with --force, and never a folder that holds anything else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from livt_scale.checkpoint.tensor_file import write_tensors
from livt_scale.export.timm import compare_with_timm, timm_config
from livt_scale.train.export_info import (
    CONFIG,
    FILES,
    WEIGHTS,
    ExportInfo,
    ModelFacts,
    WeightsFile,
    identity,
    is_export,
    read_info,
)
from livt_scale.train.load_trained import Trained, Weights, load_trained
from livt_scale.util.atomic import new_folder
from livt_scale.util.errors import ExportError
from livt_scale.util.outside import real_path

_log = logging.getLogger(__name__)
COSINE = (
    "timm has no cosine head: livt reads this export with its head, timm without it, by "
    "create_model('local-dir:…', pretrained=True, num_classes=0)"
)


def export_run(
    run_dir: Path,
    out: Path,
    *,
    which: str | None = None,
    weights: Weights = "raw",
    for_timm: bool = True,
    force: bool = False,
) -> ExportInfo:
    """Write the classifier of `run_dir` to `out`; `which` checkpoint and `weights`: see `train.load_trained`.

    for_timm: refuse a network that timm cannot build. force: replace the export of another run. Raises ExportError
    (`out` holds something else, no room), and what `load_trained` raises.
    """
    check_target(out)
    trained = load_trained(run_dir, which=which, weights=weights)
    if for_timm and trained.tuning.freezes:
        raise ExportError(
            f"{run_dir} was trained with train: {trained.tuning.name}, which cannot be merged into timm's network",
            remedy="give --to livt, for livt.load, livt eval and livt predict, or --to onnx",
        )
    return write_export(trained, out, force=force)


def write_export(trained: Trained, out: Path, *, force: bool = False) -> ExportInfo:
    """Write `trained` to `out` atomically. What is replaced there: see `check_target`.

    timm's part of config.json is left out where the network is not timm's (`trained.tuning`).
    """
    check_target(out, weights=trained.weights, file=WEIGHTS, force=force)
    tensors = {name: t.detach().cpu().contiguous() for name, t in trained.model.state_dict().items()}
    try:
        with new_folder(real_path(out)) as temporary:
            write_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            info = ExportInfo(**dict(model_facts(trained)), weights=WeightsFile.of(temporary / WEIGHTS))
            of_timm = {} if info.tuning.freezes else timm_config(info)
            config = of_timm | {"livt": info.model_dump(mode="json")}
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="ascii")
            if of_timm:
                compare_with_timm(trained.model, temporary, info.model)
                if info.cosine_scale is not None:
                    _log.warning("export: %s", COSINE)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{out} cannot be written: {error}", remedy="see to free space and rights there, or give another --out"
        ) from error
    _log.info("export: %s", info.calibration)
    return info


def check_target(
    out: Path, *, weights: Mapping[str, Any] | None = None, file: str = WEIGHTS, force: bool = False
) -> None:
    """Raise ExportError unless `out` may be written: absent, an empty folder, or only an export of ours.

    weights: the lineage of what is to be exported (None: not known yet). An export of another run, by another method,
    or without `file`, so in another layout, is replaced only with `force`.
    """
    if out.is_symlink() and not out.exists():
        raise ExportError(f"{out} is a link that leads nowhere", remedy="remove it, or give another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file", remedy="give a folder as --out")
    inside = sorted(p.name for p in out.iterdir())
    foreign = [name for name in inside if name not in FILES]
    if foreign or (inside and not is_export(out)):
        named = ", ".join(repr(name) for name in (foreign or inside)[:5])
        raise ExportError(f"{out} holds what is not an export ({named})", remedy="give a new folder as --out")
    if inside and weights is not None and not force:
        _refuse_other_export(out, weights, is_alike=file in inside)


def _refuse_other_export(out: Path, weights: Mapping[str, Any], *, is_alike: bool) -> None:
    remedy = "give a new folder as --out, or --force to replace it"
    try:
        there = read_info(out).lineage
    except ExportError as error:
        raise ExportError(f"{out} holds an export that cannot be read: {error.message}", remedy=remedy) from None
    if identity(there) != identity(weights):
        run, method = identity(there)
        by = f" by {method}" if method else ""
        raise ExportError(f"{out} holds another export: {there.get('checkpoint')} of run {run[:12]}{by}", remedy=remedy)
    if not is_alike:
        raise ExportError(f"{out} holds an export in another layout", remedy=remedy)


def model_facts(trained: Trained) -> ModelFacts:
    recipe = trained.recipe
    assert recipe.stages.finetune is not None
    return ModelFacts(
        model=recipe.model,
        class_names=trained.classes.names,
        class_counts=trained.classes.counts,
        group_counts=trained.classes.group_counts,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation=recipe.data.interpolation,
        crop_pct=recipe.data.crop_pct,
        many_over=recipe.data.many_over,
        few_under=recipe.data.few_under,
        precision=recipe.parallel.precision,
        loss=recipe.stages.finetune.loss,
        cosine_scale=recipe.stages.finetune.cosine_scale,
        calibration=trained.calibration,
        tuning=trained.tuning,
        lineage={**trained.weights, "learnt_from": trained.learnt_from},
    )
