"""Exports a trained model as two files for other tools: `model.safetensors` and `config.json`. No pickle, no recipe.

    livt export runs/try --out exports/try
    timm.create_model("local-dir:exports/try", pretrained=True)      # the same logits, no other argument

`config.json` is timm's, with one part of ours, `livt`: classes and their training counts, loss, pixel statistics, and
the origin of the weights (checkpoint, position, digest of what decided the training). No path and no date: the same
weights give the same bytes.

An export is written atomically, and only after timm has built it from the temporary folder and reproduced the logits
of the live model. It replaces an older export of the same run; one of another run only with --force, and never a folder
that holds anything else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from livt_scale.checkpoint.foreign.safetensors_files import read_safetensors
from livt_scale.checkpoint.io import sha256_of
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.checkpoint.tensor_file import write_tensors
from livt_scale.config.load import load_saved
from livt_scale.config.model import MODEL_SIZES, USUAL_FIRST_WIDTH
from livt_scale.config.recipe import Data, Finetune, Model, Parallel, Recipe, Stages
from livt_scale.config.stages import AnyLoss
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.image.transforms import EVAL_CROP, EVAL_CROP_UP_TO_PX
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import BATCH, evaluate
from livt_scale.evaluation.logits import About, Outputs, gather
from livt_scale.evaluation.tta import Views
from livt_scale.extensions import load_extensions
from livt_scale.models.classifier import AnyClassifier, build_classifier
from livt_scale.models.layers import vit_args
from livt_scale.models.resnet import use_small_stem
from livt_scale.train.load_trained import Trained, Weights, load_trained, pick_checkpoint
from livt_scale.train.run_dir import is_run
from livt_scale.util.atomic import new_folder
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.util.outside import first_mistake, read_json

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# timm builds any ViT from any of these names, given all arguments; the nearest one helps a reader recognise the model.
TIMM_NAMES = {
    "vit_micro": "vit_tiny_patch16_224",
    "vit_ti": "vit_tiny_patch16_224",
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
    "vit_h": "vit_huge_patch14_224",
    "resnet_micro": "resnet18",  # with other arguments
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
}


@dataclass(frozen=True)
class Evaluated:
    """outputs: on rank 0, where they were to be kept."""

    report: dict[str, Any]
    outputs: Outputs | None


class WeightsFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: NonNegativeInt
    sha256: str


class ExportInfo(BaseModel):
    """The part `livt` of config.json: the facts about the model that timm's part lacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["livt-export"] = "livt-export"
    version: Literal[1] = 1
    model: Model
    class_names: tuple[str, ...]
    class_counts: tuple[NonNegativeInt, ...]  # of the training set, without its quarantine
    group_counts: tuple[NonNegativeInt, ...] | None = None  # of what decides the groups; None: class_counts do
    mean: tuple[float, ...]  # of the pixels in [0, 1]
    std: tuple[float, ...]
    many_over: int
    few_under: int
    precision: Literal["fp32", "bf16"]  # of the forward pass in training and evaluation; the weights are fp32
    loss: AnyLoss
    lineage: dict[str, Any]
    weights: WeightsFile

    @model_validator(mode="after")
    def _every_class_has_a_count(self) -> Self:
        for name in ("class_counts", "group_counts"):
            counts = getattr(self, name)
            if counts is not None and len(self.class_names) != len(counts):
                raise ValueError(f"{len(self.class_names)} class_names for {len(counts)} {name}")
        return self

    def recipe(self, folder: Path) -> Recipe:
        """What evaluating this model needs of a recipe; its training data are not known here."""
        data = Data(train=str(folder), mean=self.mean, std=self.std, many_over=self.many_over, few_under=self.few_under)
        stages = Stages(finetune=Finetune(init="scratch", loss=self.loss, layer_decay=1.0))
        parallel = Parallel(precision=self.precision)
        return Recipe(name="export", data=data, model=self.model, stages=stages, parallel=parallel)


def export_run(
    run_dir: Path, out: Path, *, which: str | None = None, weights: Weights = "raw", force: bool = False
) -> ExportInfo:
    """Write the classifier of `run_dir` to `out`; `which` checkpoint and `weights`: see `train.load_trained`.

    force: replace the export of another run. Raises ExportError (`out` holds something else, no room), and what
    `load_trained` raises.
    """
    check_target(out)
    return write_export(load_trained(run_dir, which=which, weights=weights), out, force=force)


def write_export(trained: Trained, out: Path, *, force: bool = False) -> ExportInfo:
    """Write `trained` to `out` atomically. What is replaced there: see `check_target`."""
    check_target(out, weights=trained.weights, force=force)
    tensors = {name: t.detach().cpu().contiguous() for name, t in trained.model.state_dict().items()}
    try:
        with new_folder(out.resolve()) as temporary:
            write_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            info = _info(trained, temporary / WEIGHTS)
            config = timm_config(info) | {"livt": info.model_dump(mode="json")}
            (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="ascii")
            _compare_with_timm(trained.model, temporary, info.model)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{out} cannot be written: {error}", remedy="see to free space and rights there, or give another --out"
        ) from error
    return info


def check_target(out: Path, *, weights: Mapping[str, Any] | None = None, force: bool = False) -> None:
    """Raise ExportError unless `out` may be written: absent, an empty folder, or only an export of ours.

    weights: the lineage of what is to be exported (None: not known yet). An export of another run, or by another
    method, is replaced only with `force`.
    """
    if out.is_symlink() and not out.exists():
        raise ExportError(f"{out} is a link that leads nowhere", remedy="remove it, or give another --out")
    if not out.exists():
        return
    if not out.is_dir():
        raise ExportError(f"{out} is a file", remedy="give a folder as --out")
    inside = sorted(p.name for p in out.iterdir())
    foreign = [name for name in inside if name not in (WEIGHTS, CONFIG)]
    if foreign or (inside and not is_export(out)):
        named = ", ".join(repr(name) for name in (foreign or inside)[:5])
        raise ExportError(f"{out} holds what is not an export ({named})", remedy="give a new folder as --out")
    if inside and weights is not None and not force:
        _refuse_other_export(out, weights)


def _refuse_other_export(out: Path, weights: Mapping[str, Any]) -> None:
    remedy = "give a new folder as --out, or --force to replace it"
    try:
        there = read_info(out).lineage
    except ExportError as error:
        raise ExportError(f"{out} holds an export that cannot be read: {error.message}", remedy=remedy) from None
    if _identity(there) != _identity(weights):
        run, method = _identity(there)
        by = f" by {method}" if method else ""
        raise ExportError(f"{out} holds another export: {there.get('checkpoint')} of run {run[:12]}{by}", remedy=remedy)


def run_of(path: Path, *, which: str | None = None) -> str:
    """What identifies the run that the weights in `path`, a run or an export, are of. Raises LivtError."""
    if is_run(path):
        facts = read_manifest(pick_checkpoint(path, which=which)).facts
        return str(facts.get("run") or facts["recipe_digest"])
    return _identity(read_info(path).lineage)[0]


def _identity(lineage: Mapping[str, Any]) -> tuple[str, str | None]:
    """(the run that weights are of, the method that changed them after training; None: none did)."""
    baseline = lineage.get("baseline") or {}
    return str(lineage.get("run") or lineage.get("recipe_digest")), baseline.get("method")


def is_export(path: Path) -> bool:
    """Whether config.json in `path` is marked as ours; nothing else is checked."""
    try:
        part = read_json(path / CONFIG, "description of weights").get("livt")
        return bool(part.get("format") == "livt-export")
    except (OSError, ValueError, AttributeError):
        return False


def load_export(folder: Path) -> tuple[AnyClassifier, ExportInfo]:
    """The classifier in `folder`, on the CPU in evaluation mode, every byte of its weights checked.

    Raises ExportError naming the file: absent, of another version, damaged, or not of the model that config.json says.
    """
    info = read_info(folder)
    path = folder / WEIGHTS
    remedy = "copy the export again, or write it again with `livt export`"
    try:
        size = path.stat().st_size
        if size != info.weights.bytes or sha256_of(path) != info.weights.sha256:
            raise ExportError(f"{path} was cut or changed: it is not what {CONFIG} says", remedy=remedy)
        tensors, _ = read_safetensors(path)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}", remedy=remedy) from error
    with torch.random.fork_rng(devices=[]):
        model = build_classifier(info.model, num_classes=len(info.class_names), drop_path=0.0).eval()
    wrong = _misfits(tensors, model.state_dict())
    if wrong:
        raise ExportError(f"{path} does not fit the model in {CONFIG}: {'; '.join(wrong[:5])}", remedy=remedy)
    model.load_state_dict(tensors)
    return model, info


def read_info(folder: Path) -> ExportInfo:
    """The part `livt` of `folder`'s config.json. Raises ExportError."""
    path = folder / CONFIG
    if not is_export(folder):
        raise ExportError(f"{path} is not of an export by livt", remedy="write one with `livt export RUN --out DIR`")
    load_extensions()
    try:
        return ExportInfo.model_validate(read_json(path, "description of weights")["livt"])
    except ValidationError as error:
        why = f"livt: {first_mistake(error)}"
        raise ExportError(f"{path}: {why}", remedy="was it written by another livt_scale?") from None


def timm_config(info: ExportInfo) -> dict[str, Any]:
    """config.json as timm reads it (`timm.models._hub.load_model_config_from_path`, checked with timm 1.0.31)."""
    model, num_classes = info.model, len(info.class_names)
    of_kind, first_conv, classifier = _of_vit(model) if model.is_vit else _of_resnet(model)
    return {
        "architecture": _timm_name(model),
        "num_classes": num_classes,
        **of_kind,
        "global_pool": "avg",
        "label_names": list(info.class_names),
        "pretrained_cfg": {
            "input_size": [model.channels, model.image_px, model.image_px],
            "fixed_input_size": model.is_vit,
            "interpolation": "bicubic",
            "crop_pct": EVAL_CROP if model.image_px <= EVAL_CROP_UP_TO_PX else 1.0,
            "crop_mode": "center",
            "mean": list(info.mean),
            "std": list(info.std),
            "num_classes": num_classes,
            "pool_size": None,
            "first_conv": first_conv,
            "classifier": classifier,
            "paper_ids": "arXiv:2212.02015",
        },
    }


def _timm_name(model: Model) -> str:
    """For a size from outside the package: that of the ViT whose width is the nearest."""
    vits = [size for size in TIMM_NAMES if size in MODEL_SIZES]
    width = model.dims.width if model.is_vit else 0
    nearest = min(vits, key=lambda size: abs(MODEL_SIZES[size].width - width))
    return TIMM_NAMES.get(model.size, TIMM_NAMES[nearest])


def _of_vit(model: Model) -> tuple[dict[str, Any], str, str]:
    args = {**vit_args(model), "global_pool": "avg"}
    return {"num_features": model.dims.width, "model_args": args}, "patch_embed.proj", "head"


def _of_resnet(model: Model) -> tuple[dict[str, Any], str, str]:
    """timm's arguments cannot express the small stem: `timm_network` describes how to read the weights then."""
    width = model.stage_widths[-1] * (4 if model.has_bottlenecks else 1)
    return {"num_features": width, "model_args": _resnet_args(model)}, "conv1", "fc"


def _resnet_args(model: Model) -> dict[str, Any]:
    """The arguments that differ from the defaults of timm's network of the same name."""
    args: dict[str, Any] = {"in_chans": model.channels}
    if model.stage_widths[0] != USUAL_FIRST_WIDTH:
        args |= {"layers": list(model.stage_blocks), "channels": list(model.stage_widths)}
    return args


def timm_network(folder: Path, shape: Model) -> nn.Module:
    """timm's network with the weights in `folder`, from that folder alone, in evaluation mode.

    A ResNet for images up to 64 px is timm's with another stem, which no argument of timm's makes (1.0.31): asked for
    "local-dir:", timm refuses the shape of `conv1`. A few lines replace the stem (`models.resnet.use_small_stem`).
    """
    import timm

    if not shape.has_small_stem:
        network: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        return network.eval()
    tensors, _ = read_safetensors(folder / WEIGHTS)
    network = timm.create_model(TIMM_NAMES[shape.size], num_classes=len(tensors["fc.bias"]), **_resnet_args(shape))
    use_small_stem(network, shape.stage_widths[0])
    network.load_state_dict(tensors)
    return network.eval()


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
    return Trained(model, info.recipe(path), classes, lineage, learnt_from)


def evaluate_path(
    path: Path,
    *,
    data: str | Path | None = None,
    which: str | None = None,
    weights: Weights = "raw",
    batch: int = BATCH,
    views: Views = Views(),  # noqa: B008 - frozen
    keep: bool = False,
    world: World = World(),  # noqa: B008 - frozen
) -> Evaluated:
    """Evaluate a run or an export on the shards in `data`, a folder or URL (None: the run's own evaluation set).

    A collective call of the ranks of `world`. The report of `train.evaluate.evaluate`, with `weights`: what was
    evaluated, and from where it was read; with `keep` the logits of every image too.
    """
    trained = open_trained(path, which=which, weights=weights)
    folder = data or evaluation_set(path, trained)
    if folder is None:
        why = "an export does not know any" if not is_run(path) else "its recipe has no data.val"
        raise UsageError(f"no evaluation set for {path}: {why}", remedy="give a folder of shards with --data")
    shards = ShardSet.open(folder, data=trained.recipe.data)
    kept: list[Tensor] | None = [] if keep else None
    report = evaluate(
        trained.model.to(world.device),
        shards,
        trained.recipe,
        world=world,
        classes=trained.classes,
        batch=batch,
        views=views,
        keep=kept,
    )
    report |= {"weights": {**trained.weights, "read_from": str(path)}}
    outputs = None if kept is None else gather(kept, shards, _about(trained, report), world=world)
    return Evaluated(report, outputs)


def _about(trained: Trained, report: dict[str, Any]) -> About:
    finetune, data = trained.recipe.stages.finetune, trained.recipe.data
    assert finetune is not None
    return About(
        class_names=trained.classes.names,
        class_counts=trained.classes.counts,
        group_counts=trained.classes.group_counts,
        many_over=data.many_over,
        few_under=data.few_under,
        loss=finetune.loss.name,
        logit_scale=finetune.loss.logit_scale,
        facts={name: report[name] for name in ("precision", "views", "data", "weights")},
    )


def evaluation_set(path: Path, trained: Trained) -> str | None:
    """The evaluation set of the run at `path`, from which `trained` was read; None: it has none, or is an export."""
    if not is_run(path):
        return None
    saved = path / "recipe.yaml"  # newer than the checkpoint's, where the run was moved and continued
    recipe = load_saved(saved) if saved.is_file() else trained.recipe
    return recipe.data.val


def _info(trained: Trained, weights: Path) -> ExportInfo:
    recipe = trained.recipe
    assert recipe.stages.finetune is not None
    return ExportInfo(
        model=recipe.model,
        class_names=trained.classes.names,
        class_counts=trained.classes.counts,
        group_counts=trained.classes.group_counts,
        mean=recipe.data.mean,
        std=recipe.data.std,
        many_over=recipe.data.many_over,
        few_under=recipe.data.few_under,
        precision=recipe.parallel.precision,
        loss=recipe.stages.finetune.loss,
        lineage={**trained.weights, "learnt_from": trained.learnt_from},
        weights=WeightsFile(bytes=weights.stat().st_size, sha256=sha256_of(weights)),
    )


def _compare_with_timm(model: nn.Module, folder: Path, shape: Model) -> None:
    """Raise ExportError unless timm, from `folder` alone, gives the logits of `model`."""
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(2, shape.channels, shape.image_px, shape.image_px, generator=_generator())
        theirs = timm_network(folder, shape)
    device = next(model.parameters()).device
    was_training = model.training
    with torch.inference_mode():
        ours = model.eval()(images.to(device)).cpu()
        read_back = theirs(images)
    model.train(was_training)
    if not torch.allclose(ours, read_back, rtol=0, atol=1e-6 * float(ours.abs().max())):
        gap = float((ours - read_back).abs().max())
        raise ExportError(f"timm reads other logits from the export than the model gives: they differ by {gap:.2g}")


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _misfits(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    wrong = [f"{name} is missing" for name in wanted if name not in tensors]
    wrong += [f"{name} has no place" for name in tensors if name not in wanted]
    return wrong + [
        f"{name} is {list(tensors[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
