"""Which MFU the published training times of MAE imply, and whether one explains them all. No GPU, no torch.

    python benchmarks/published_times.py --json published.json

Hours: arXiv 2111.06377 and its public code's FINETUNE.md, on V100s in fp16; FLOPs are those of this project's models.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from livt_scale.config.recipe import Model
from livt_scale.plan.devices import DEVICES
from livt_scale.plan.flops import classifier_flops, mae_flops

IMAGES, CLASSES = 1_281_167, 1000  # ImageNet-1k
RUNS = (  # name, size, pretraining, epochs, hours, V100s
    ("MAE ViT-L, 800 epochs, 64 V100, 42 h", "vit_l", True, 800, 42.0, 64),
    ("fine-tuning ViT-B, 100 epochs, 32 V100, 7.2 h", "vit_b", False, 100, 7 + 11 / 60, 32),
    ("fine-tuning ViT-L, 50 epochs, 32 V100, 8.9 h", "vit_l", False, 50, 8 + 52 / 60, 32),
    ("fine-tuning ViT-H, 50 epochs, 64 V100, 13.2 h", "vit_h", False, 50, 13 + 9 / 60, 64),
)
WITHIN = 0.25


def implied() -> dict[str, float]:
    found = {}
    for name, size, pretraining, epochs, hours, gpus in RUNS:
        model = Model.model_validate({"size": size})
        flops = mae_flops(model, mask_ratio=0.75) if pretraining else classifier_flops(model, num_classes=CLASSES)
        found[name] = flops.train * IMAGES * epochs / (hours * 3600 * gpus * DEVICES["v100"].fp16 * 1e12)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="MFU that published times imply.")
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    mfu = implied()
    ratio, bound = max(mfu.values()) / min(mfu.values()), (1 + WITHIN) / (1 - WITHIN)
    for name, value in mfu.items():
        print(f"{name:<47} {value:.3f}")
    verdict = "yes" if ratio <= bound else "no"
    print(f"one MFU within 25 % of all: {verdict} (largest / smallest {ratio:.2f}; {bound:.2f} would do)")
    if args.json:
        args.json.write_text(json.dumps({"mfu": mfu, "ratio": ratio, "one_explains_all": ratio <= bound}) + "\n")


if __name__ == "__main__":
    main()
