"""Features of a set of images in a folder: computed once, then classified without the model (`knn.py`, `probe.py`).

    livt features runs/try --data shards/train --out features/train

    features/train/features.safetensors    features float32 [N, D], labels int64 [N], the keys as JSON bytes
    features/train/manifest.json           of which weights, which images, and how these were prepared

The features are what the head is given: of our ViTs the mean of the patch tokens after the last norm. The classes are
those of the images, not of the model, so a model can be measured on a set that it was not trained on. Rows are in the
order of the set for any number of ranks. The folder appears when it is complete; its manifest has the SHA-256 of the
tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from livt_scale.checkpoint.tensor_file import read_safetensors, write_tensors
from livt_scale.config.recipe import Recipe
from livt_scale.config.run_place import absolute_run_dir
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import BATCH, data_lineage
from livt_scale.evaluation.logits import to_rank_0
from livt_scale.posthoc import features
from livt_scale.train.finetune import initial_classifier
from livt_scale.train.load_trained import Trained
from livt_scale.util.atomic import new_folder, plain_disk_errors
from livt_scale.util.errors import DataError, UsageError
from livt_scale.util.outside import first_mistake, parse_json, read_json, real_path, sha256_of

TENSORS, MANIFEST = "features.safetensors", "manifest.json"
REMEDY = "compute them again with livt features"


class FeatureFacts(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["livt-features"] = "livt-features"
    version: Literal[1] = 1
    num_samples: PositiveInt
    width: PositiveInt
    class_names: tuple[str, ...]
    group_counts: tuple[NonNegativeInt, ...]  # images of each class that decide its group, if this is a training set
    many_over: int
    few_under: int
    weights: dict[str, Any]  # lineage
    images: dict[str, Any]  # how they were prepared
    data: dict[str, Any]  # lineage
    sha256: str  # of the tensors


@dataclass(frozen=True)
class FeatureSet:
    """features float32 [N, D], labels int64 [N], keys [N]; sample i of the set in row i."""

    features: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    facts: FeatureFacts
    where: str

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what `write_features` wrote, every byte checked. Raises DataError, which says what is wrong."""
        facts = _read_facts(folder)
        path = folder / TENSORS
        try:
            if sha256_of(path) != facts.sha256:
                raise ValueError(f"it was cut or changed: it is not what {MANIFEST} says")
            tensors, _ = read_safetensors(path, "logits")
            values, labels = tensors["features"], tensors["labels"]
            keys = tuple(parse_json(tensors["keys"].numpy().tobytes()))
            shape = (facts.num_samples, facts.width)
            if values.shape != shape or labels.shape != shape[:1] or len(keys) != len(labels):
                raise ValueError(f"features {list(values.shape)}, labels {list(labels.shape)}, {len(keys)} keys")
            if values.dtype != torch.float32 or labels.dtype != torch.int64:
                raise ValueError(f"features of {values.dtype}, labels of {labels.dtype}")
            if labels.min() < 0 or labels.max() >= len(facts.class_names):
                raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be used: {error}", remedy=REMEDY) from error
        return cls(values, labels, keys, facts, str(folder))


def _read_facts(folder: Path) -> FeatureFacts:
    path = folder / MANIFEST
    try:
        return FeatureFacts.model_validate(read_json(path, "manifest"))
    except OSError as error:
        raise DataError(f"{folder} holds no features: {path}: {error.strerror}", remedy=REMEDY) from error
    except ValidationError as error:
        raise DataError(f"{path} is not of features: {first_mistake(error)}", remedy=REMEDY) from error
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}", remedy=REMEDY) from error


def is_feature_set(folder: Path) -> bool:
    """Whether manifest.json in `folder` is marked as ours."""
    try:
        return bool(read_json(folder / MANIFEST, "manifest").get("format") == "livt-features")
    except (OSError, ValueError, AttributeError):
        return False


def check_target(out: Path, *, force: bool) -> None:
    """Raise UsageError unless `out` may be written: absent, an empty folder, or features with `force`."""
    if not out.exists() and not out.is_symlink():
        return
    inside = sorted(path.name for path in out.iterdir()) if out.is_dir() else ["(no folder)"]
    if inside and not (force and is_feature_set(out) and set(inside) <= {TENSORS, MANIFEST}):
        remedy = "give another --out" + (", or --force to replace them" if is_feature_set(out) else "")
        raise UsageError(f"{out} is there already and holds {', '.join(inside[:5])}", remedy=remedy)


def backbone_of(recipe: Recipe, shards: ShardSet) -> Trained:
    """The model as the fine-tuning of `recipe` begins: of its pretraining, or of the weights that it names."""
    part = recipe.stages.finetune
    if part is None or part.init == "scratch":
        raise UsageError(
            "the recipe's fine-tuning begins from no weights: features of a random network are of no use",
            remedy="set stages.finetune.init to pretrain or weights, or give a finished run",
        )
    run_dir = absolute_run_dir(recipe.run_dir, name=recipe.name)
    recipe = recipe.at("finetune")
    model, origin = initial_classifier(recipe, num_classes=shards.num_classes, run_dir=run_dir)
    assert origin is not None, "init is not scratch"
    return Trained(model.eval(), recipe, TrainingClasses.of(shards, recipe.data), origin, {})


def write_features(
    trained: Trained,
    shards: ShardSet,
    out: Path,
    *,
    batch: int = BATCH,
    force: bool = False,
    world: World = World(),  # noqa: B008 - frozen
) -> FeatureFacts:
    """Compute the features of `shards` and write them to `out`; a collective call. Returns the manifest.

    Raises UsageError (`out` is taken), DataError (no space) and, on every rank, what goes wrong on one.
    """
    world.peers.on_rank0(lambda: check_target(out, force=force))
    if shards.num_samples < world.world_size:
        raise UsageError(f"{shards.num_samples} images for {world.world_size} processes", remedy="start fewer")
    own = world.peers.run_all(lambda: features.features(trained, shards, batch=batch, world=world))
    values = to_rank_0(own.values, world)
    return world.peers.on_rank0(lambda: _write(values, trained, shards, out))


def _write(values: Tensor | None, trained: Trained, shards: ShardSet, out: Path) -> FeatureFacts:
    assert values is not None, "on rank 0"
    if not values.isfinite().all():
        row = int((~values.isfinite().all(dim=1)).nonzero()[0])
        raise DataError(f"the features of image {row} of {shards.where} are not finite", remedy="evaluate in fp32")
    positions = shards.usable_to_sample(np.arange(shards.num_samples, dtype=np.int64))
    labels = torch.from_numpy(shards.labels(positions))
    keys = torch.frombuffer(bytearray(json.dumps(shards.keys(positions)).encode()), dtype=torch.uint8)
    tensors = {"features": values.contiguous(), "labels": labels.contiguous(), "keys": keys}
    needed = sum(tensor.nbytes for tensor in tensors.values())
    with plain_disk_errors(real_path(out), needed=needed), new_folder(real_path(out)) as temporary:
        write_tensors(tensors, temporary / TENSORS, metadata={"format": "pt"})
        facts = _facts(values, labels, trained, shards, sha256=sha256_of(temporary / TENSORS))
        (temporary / MANIFEST).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return facts


def _facts(values: Tensor, labels: Tensor, trained: Trained, shards: ShardSet, *, sha256: str) -> FeatureFacts:
    recipe, names = trained.recipe, tuple(shards.manifest.class_names)
    data = recipe.data
    counts = tuple(torch.bincount(labels, minlength=len(names)).tolist())
    groups = trained.classes.group_counts if trained.classes.names == names else None
    return FeatureFacts(
        num_samples=len(values),
        width=values.shape[1],
        class_names=names,
        group_counts=groups or counts,
        many_over=data.many_over,
        few_under=data.few_under,
        weights=trained.weights,
        images={
            "image_px": recipe.model.image_px,
            "channels": recipe.model.channels,
            "mean": list(data.mean),
            "std": list(data.std),
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "precision": recipe.parallel.precision,
        },
        data=data_lineage(shards),
        sha256=sha256,
    )


def check_comparable(train: FeatureSet, other: FeatureSet) -> None:
    """Raise DataError unless both are of the same weights, preparation and classes, and of different images."""
    for name, what in (
        ("weights", "weights"), ("images", "image preparation"), ("width", "width"), ("class_names", "classes"),
    ):  # fmt: skip
        if getattr(train.facts, name) != getattr(other.facts, name):
            raise DataError(f"{train.where} and {other.where} differ in {what}", remedy=REMEDY)
    if train.facts.data["manifest_digest"] == other.facts.data["manifest_digest"]:
        raise DataError(
            f"{train.where} and {other.where} are of the same images: each would find itself",
            remedy="give the features of a training set and of an evaluation set",
        )
