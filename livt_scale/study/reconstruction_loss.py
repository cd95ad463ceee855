"""How well a pretraining reconstructs images that it has not seen: its own loss on the evaluation set.

The masks are drawn from (0, 0, sample key), so that every run is asked for the same patches of the same images. Written
to RUN/pretrain/reconstruction.json, and read from there the next time.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import torch

from livt_scale.checkpoint.manifest import MANIFEST
from livt_scale.config.load import load_saved
from livt_scale.data.loader import eval_batches, normalise
from livt_scale.data.seeds import sample_rng
from livt_scale.data.shard_set import ShardSet
from livt_scale.models.mae import build_mae
from livt_scale.train.finetune import final_pretraining, read_pretraining
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import RunError
from livt_scale.util.outside import read_checked, read_json

BATCH = 250


def reconstruction_loss(run_dir: Path) -> float:
    """Mean over the recipe's data.val, float64, of the run's final pretraining. Raises RunError: it has not ended."""
    checkpoint = final_pretraining(run_dir)
    digest = hashlib.sha256(read_checked(checkpoint / MANIFEST, "checkpoint manifest")).hexdigest()
    kept = run_dir / "pretrain" / "reconstruction.json"
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it is measured again
        told = read_json(kept, "record")
        if told.get("checkpoint") == digest:
            return float(told["loss"])
    loss = _measure(run_dir)
    write_atomic(kept, (json.dumps({"checkpoint": digest, "loss": loss}) + "\n").encode())
    return loss


@torch.no_grad()
def _measure(run_dir: Path) -> float:
    recipe = load_saved(run_dir / "recipe.yaml").at("pretrain")
    part = recipe.stages.pretrain
    if recipe.data.val is None or part is None:
        raise RunError(f"{run_dir} has no evaluation set to reconstruct", remedy="set data.val")
    model = build_mae(recipe.model, norm_pix=part.norm_pix, mask_ratio=part.mask_ratio).eval()
    state, _, _ = read_pretraining(run_dir)
    model.load_state_dict(state)
    shards = ShardSet.open(recipe.data.val, data=recipe.data)
    total = 0.0
    for batch in eval_batches(shards, recipe, rank=0, world_size=1, batch=BATCH):
        pixels = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
        draws = [
            sample_rng(0, 0, key, "held out").random(recipe.model.num_patches, dtype="float32") for key in batch.keys
        ]
        total += float(model(pixels, torch.stack([torch.from_numpy(d) for d in draws]))) * len(pixels)
    return total / shards.num_samples
