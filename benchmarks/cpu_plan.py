"""Is the planner right about this CPU? Measured against planned seconds of a step, for three sizes and both stages.

    python benchmarks/cpu_plan.py --json cpu.json          # about five minutes on two idle cores
    python benchmarks/cpu_plan.py --quick                  # ViT-Ti, a step: does it run?

The constants are what `livt doctor --bench --device-file FILE` measures, none of them from a training step. Planned is
the step's computing and AdamW without the assumption for evaluation and hiccups (`Assumptions.overhead`); measured is
the median of steps of the same model on random images, eager, in fp32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe, Stage
from livt_scale.doctor.device_speeds import measure
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import build_mae
from livt_scale.optim import make_adamw, param_groups
from livt_scale.plan.assumptions import Accelerator, Assumptions
from livt_scale.plan.memory import Spread
from livt_scale.plan.step_time import step_time
from livt_scale.plan.task import DataSet, PlanTask

SIZES = {"vit_ti": 32, "vit_s": 16, "vit_b": 8}  # images of a step
CLASSES = 1000
WARM_UP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="for the constants")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device-file", type=Path, help="of livt doctor: measure no constants")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.device_file:
        tree = yaml.safe_load(args.device_file.read_text())
    else:
        tree = measure(torch.device("cpu"), seconds=1 if args.quick else args.seconds)
    rows = []
    for size, images in list(SIZES.items())[: 1 if args.quick else None]:
        for stage in ("pretrain", "finetune"):
            recipe = _recipe(size, images=images).at(stage)
            measured = _measured(recipe, stage, images, steps=1 if args.quick else args.steps)
            planned = _planned(recipe, stage, Accelerator(**tree), images)
            rows.append({"size": size, "stage": stage, "images": images, "measured_s": measured, **planned})
            print(_line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": tree, "rows": rows}, indent=2))


def _line(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {row[name]:.3f}" for name in ("products", "attention", "streams", "gaps", "adamw"))
    ratio = row["planned_s"] / row["measured_s"]
    return (
        f"| {row['size']} | {row['stage']} | {row['images']} | {row['measured_s']:.3f} | {row['planned_s']:.3f} | "
        f"{ratio:.2f} | {parts} |"
    )


def _recipe(size: str, *, images: int) -> Recipe:
    changes = [f"model.size={size}", "parallel.precision=fp32", "parallel.compile=false"]
    for stage in ("pretrain", "finetune"):
        changes += [f"stages.{stage}.global_batch={images}", f"stages.{stage}.micro_batch={images}"]
    return load_recipe(Path(__file__).parents[1] / "recipes/imagenet_lt/vit_b16.yaml", sets=changes)


def _planned(recipe: Recipe, stage: Stage, device: Accelerator, images: int) -> dict[str, float]:
    data = DataSet(images=images, classes=CLASSES, image_bytes=1.0, source="random numbers")
    task = PlanTask(recipe, stage, data, 1, 1, device, Assumptions())
    time_s = step_time(task, Spread("ddp", 1, "fp32", images, 1, False))
    parts, gap_us = time_s.parts, device.chip("fp32", "likely").gap_us
    return {
        "planned_s": time_s.gpu_s,
        "products": parts.products,
        "attention": parts.attention,
        "streams": parts.streams,
        "gaps": parts.launches * gap_us * 1e-6,
        "adamw": time_s.optimizer_s,
    }


def _measured(recipe: Recipe, stage: Stage, images: int, *, steps: int) -> float:
    torch.manual_seed(0)
    model: torch.nn.Module
    if stage == "pretrain":
        model = build_mae(recipe.model, norm_pix=True, mask_ratio=recipe.stages.pretrain.mask_ratio)
    else:
        part = recipe.stages.finetune
        model = build_classifier(recipe.model, num_classes=CLASSES, drop_path=part.drop_path)
    pixels = torch.randn(images, recipe.model.channels, recipe.model.image_px, recipe.model.image_px)
    noise = torch.rand(images, recipe.model.num_patches)
    targets = torch.zeros(images, CLASSES)
    optimizer = make_adamw(param_groups(model, lr=1e-5, weight_decay=0.05), betas=(0.9, 0.95))
    taken = []
    for _ in range(WARM_UP + steps):
        begun = time.perf_counter()
        if stage == "pretrain":
            loss = model(pixels, noise)
        else:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(model(pixels), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[WARM_UP:])


if __name__ == "__main__":
    main()
