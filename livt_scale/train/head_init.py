"""The head's weights before the first step: the mean features of each class, or vectors from a file.

    stages.finetune.head_init: class_means     w_c = m_c / ‖m_c‖,  m_c = mean of the features of the class's images
    stages.finetune.head_init: file            w_c = v_c / ‖v_c‖,  v_c = row c of the one tensor in head_file

So training starts from a nearest-mean classifier (or, with vectors of a text encoder, from a zero-shot one), which
spares the rare classes the many steps that a random row needs. The means are of one pass over the training set by the
model as it begins, each image once and prepared as for evaluation. Every rank sums the features of its images in
float64, and the sums are added up, so the result does not depend on the number of ranks. A class without an image keeps
its random row. A resumed run reads the head from its checkpoint, and makes no pass.

Source: LIFT, arXiv 2309.10019 (semantic-aware initialisation), and `init_head` of its public code.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from livt_scale.config.recipe import Recipe, digest
from livt_scale.data.settings import ImageSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.state_dict import AVERAGE
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import each_batch
from livt_scale.models.classifier import AnyClassifier, head_inputs, head_name
from livt_scale.util.errors import WeightsError
from livt_scale.util.outside import sha256_of
from livt_scale.weights.read_files import read_state

_log = logging.getLogger(__name__)


@torch.no_grad()
def start_from_class_means(strategy: Strategy, train: ShardSet, recipe: Recipe, *, world: World) -> None:
    """Set the head of `strategy` (and of its average of the weights) to the class means. A collective call."""
    means, counts = class_means(strategy, train, recipe, world=world)
    head = head_name(strategy.model)
    state = strategy.state()
    for name in (f"model.{head}.weight", f"{AVERAGE}{head}.weight"):
        if name in state:
            _fill(state[name], F.normalize(means, dim=1), counts > 0)
    strategy.restored(state)
    seen, images = int((counts > 0).sum()), int(counts.sum())
    _log.info("finetune: the head begins with the mean features of %d classes, of %d images", seen, images)


def class_means(strategy: Strategy, train: ShardSet, recipe: Recipe, *, world: World) -> tuple[Tensor, Tensor]:
    """(mean of the head's input over the images of each class, float64 [C, D]; their number, [C]), on every rank."""
    sums: list[Tensor] = []  # one, [C, D + 1]: the last column counts images

    with head_inputs(strategy.model) as given:

        def take(_: Tensor, labels: Tensor) -> None:
            features = given[0][: len(labels)].double()  # a compiled model's batch is filled up
            if not sums:
                sums.append(features.new_zeros(train.num_classes, features.shape[1] + 1))
            rows = torch.cat([features, features.new_ones(len(labels), 1)], dim=1)
            sums[0].index_add_(0, labels, rows)

        each_batch(
            strategy, train, ImageSettings.of_recipe(recipe), take, precision=recipe.parallel.precision,
            device=world.device, world=world,
        )  # fmt: skip
    if world.world_size > 1:
        dist.all_reduce(sums[0])  # each rank has images: a training set has at least one for each slot of a batch
    counts = sums[0][:, -1]
    return sums[0][:, :-1] / counts.clamp(min=1)[:, None], counts


def start_from_vectors(model: AnyClassifier, path: Path, origin: dict[str, Any]) -> dict[str, Any]:
    """Set the head of `model` to the vectors in `path`, in place. Returns `origin`, the lineage of the backbone, which
    then also depends on the vectors. Raises WeightsError, which names what does not fit."""
    weight = model.get_parameter(f"{head_name(model)}.weight")
    tensors, _ = read_state(path)
    if len(tensors) != 1:
        names = ", ".join(list(tensors)[:5])
        raise WeightsError(f"{path} holds {len(tensors)} tensors ({names})", remedy="save the class vectors alone")
    [vectors] = tensors.values()
    if vectors.shape != weight.shape:
        raise WeightsError(
            f"{path}: the vectors are {list(vectors.shape)}, and the head is {list(weight.shape)}",
            remedy="one row for each class, in the order of the set's classes, in the space of the model's features",
        )
    if empty := (vectors.norm(dim=1) == 0).nonzero().flatten().tolist():
        raise WeightsError(f"{path}: the vector of class {empty[0]} is zero", remedy="give a direction for each class")
    with torch.no_grad():
        weight.copy_(F.normalize(vectors, dim=1))
    return {
        **origin, "recipe_digest": digest({"weights": origin["recipe_digest"], "head_file": sha256_of(path)}),
    }  # fmt: skip


def _fill(target: Tensor, rows: Tensor, has_images: Tensor) -> None:
    """Copy the `rows` [C, D] that are True in `has_images` [C] into `target`, which may be sharded."""
    current = target.full_tensor() if isinstance(target, DTensor) else target
    filled = torch.where(has_images.to(current.device)[:, None], rows.to(current), current)
    if isinstance(target, DTensor):
        target.to_local().copy_(distribute_tensor(filled, target.device_mesh, target.placements).to_local())
    else:
        target.copy_(filled)
