"""A tiny set of shards, and a run directory made by hand: random weights, saved as fine-tuning saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from livt_scale.checkpoint.load import Position, Retention, Saver
from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe, digest, learnt_from
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import Spec, build_spec_model
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.state_dict import collect
from livt_scale.models.classifier import Classifier, build_classifier
from livt_scale.models.parameter_efficient import tune
from livt_scale.optim import make_adamw, param_groups

CLASS_NAMES = ("T-shirt/top", "two\nlines", 'a "quoted" one', "名前")
CLASS_COUNTS = (300, 120, 20, 3)


def tiny_recipe(*, train: Path | str = "train", val: Path | str | None = None, **model: Any) -> Recipe:
    """Grey images of 28 px and the smallest transformer, as quick as it gets."""
    is_resnet = str(model.get("size", "")).startswith("resnet")
    usual = {} if is_resnet or "timm" in model else {"size": "vit_micro", "depth": 2}
    finetune = {"init": "scratch", "epochs": 20, "global_batch": 8, "micro_batch": 8}
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": {
                "train": str(train),
                "val": None if val is None else str(val),
                "mean": [0.3] * model.get("channels", 1),
                "std": [0.25] * model.get("channels", 1),
                "workers": 0,
            },
            "model": {**usual, "image_px": 28, "channels": 1} | model,
            "stages": {"finetune": finetune | ({"layer_decay": 1.0} if is_resnet else {})},
        }
    )


def tiny_classifier(recipe: Recipe, *, num_classes: int, seed: int = 0) -> Classifier:
    """Random weights far from the initial ones: logits that tell images apart, and every tensor of its own."""
    torch.manual_seed(seed)
    part = recipe.stages.finetune
    scale = part.cosine_scale if part is not None else None
    model = build_classifier(recipe.model, num_classes=num_classes, drop_path=0.1, cosine_scale=scale)
    if part is not None:
        tune(model, part.train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_run(
    run_dir: Path,
    recipe: Recipe,
    *,
    steps: tuple[int, ...] = (40, 80),
    final: bool = True,
    scores: dict[int, float] | None = None,
    class_names: tuple[str, ...] = CLASS_NAMES,
    class_counts: tuple[int, ...] = CLASS_COUNTS,
    manifest_digest: str = "0" * 64,
) -> dict[int, Classifier]:
    """Write RUN/recipe.yaml and a checkpoint for each of `steps`; the classifiers that were saved, by step."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(to_yaml(recipe))
    learnt = {**learnt_from(recipe, "finetune"), "data.manifest": manifest_digest}
    facts = {
        "stage": "finetune",
        "strategy": "ddp",
        "recipe": recipe.model_dump(mode="json"),
        "learnt_from": learnt,
        "recipe_digest": digest(learnt),
        "class_names": list(class_names),
        "class_counts": list(class_counts),
    }
    models = {}
    with Saver(run_dir / "finetune" / "checkpoints", mode="sync", retention=Retention(keep_last=9)) as saver:
        for step in steps:
            models[step] = tiny_classifier(recipe, num_classes=len(class_names), seed=step)
            decay = None if recipe.model.is_resnet else 0.75
            groups = param_groups(models[step], lr=1e-3, weight_decay=0.05, layer_decay=decay)
            saver.save(
                collect(models[step], make_adamw(groups, betas=(0.9, 0.99))),
                position=Position(epoch=step // 20, step=step),
                facts=facts,
                score=(scores or {}).get(step),
                final=final and step == steps[-1],
            )
    return models


def tiny_shards(folder: Path, per_class: dict[str, int], *, size_px: int = 28) -> ShardSet:
    """Shards of so many random grey images of each class, three to a shard, in `folder`/set."""
    rng = np.random.default_rng(len(per_class))
    for name, count in per_class.items():
        (folder / "raw" / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (size_px, size_px), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "raw" / name / f"{k}.png")
    part = {
        "name": "tiny",
        "class_names": list(per_class),
        "sources": {"raw": {"folder": {"root": "raw"}}},
        "sets": {"set": {"source": "raw", "shard_samples": 3}},
    }
    build(Spec(build=build_spec_model().model_validate(part), folder=folder), folder, workers=1)
    return ShardSet.open(folder / "set")
