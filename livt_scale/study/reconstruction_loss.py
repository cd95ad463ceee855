"""How well a pretraining reconstructs images that it has not seen: its own loss on the evaluation set.

The masks are drawn from (0, 0, sample key), so that every run is asked for the same patches of the same images. Written
to RUN/pretrain/reconstruction.json, and read from there the next time, unless the evaluation set is another one now.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from livt_scale.checkpoint.manifest import MANIFEST
from livt_scale.config.load import load_saved
from livt_scale.config.recipe import Recipe
from livt_scale.data.loader import eval_batches, normalise
from livt_scale.data.seeds import sample_rng
from livt_scale.data.shard_set import ShardSet
from livt_scale.models.mae import build_mae
from livt_scale.train.finetune import final_pretraining, read_pretraining
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import LivtError, RunError
from livt_scale.util.outside import read_checked, read_json

BATCH = 250


class Reconstruction(NamedTuple):
    """loss: the mean over the images of the set whose manifest (and quarantine) have the digest `data`."""

    loss: float
    data: str


def reconstruction_loss(run_dir: Path) -> Reconstruction:
    """Of the run's final pretraining, on the recipe's data.val. Raises RunError (it has not ended) and DataError.

    Where that set is not on this machine, what was measured before counts.
    """
    checkpoint = final_pretraining(run_dir)
    digest = hashlib.sha256(read_checked(checkpoint / MANIFEST, "checkpoint manifest")).hexdigest()
    path = run_dir / "pretrain" / "reconstruction.json"
    kept = None
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it is measured again
        record = read_json(path, "record")
        if record.get("checkpoint") == digest:
            kept = Reconstruction(float(record["loss"]), str(record["data"]))
    recipe = load_saved(run_dir / "recipe.yaml").at("pretrain")
    if recipe.data.val is None or recipe.stages.pretrain is None:
        raise RunError(f"{run_dir} has no evaluation set to reconstruct", remedy="set data.val")
    try:
        shards = ShardSet.open(recipe.data.val, data=recipe.data)
    except LivtError:
        if kept is None:
            raise
        return kept
    if kept is not None and kept.data == shards.digest:
        return kept
    found = Reconstruction(_measure(run_dir, recipe, shards), shards.digest)
    write_atomic(path, (json.dumps({"checkpoint": digest, **found._asdict()}) + "\n").encode())
    return found


@torch.no_grad()
def _measure(run_dir: Path, recipe: Recipe, shards: ShardSet) -> float:
    part = recipe.stages.pretrain
    assert part is not None
    model = build_mae(recipe.model, norm_pix=part.norm_pix, mask_ratio=part.mask_ratio).eval()
    state, _, _ = read_pretraining(run_dir)
    model.load_state_dict(state)
    total = 0.0
    for batch in eval_batches(shards, recipe, rank=0, world_size=1, batch=BATCH):
        pixels = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
        draws = [
            sample_rng(0, 0, key, "held out").random(recipe.model.num_patches, dtype="float32") for key in batch.keys
        ]
        total += float(model(pixels, torch.stack([torch.from_numpy(d) for d in draws]))) * len(pixels)
    return total / shards.num_samples
