"""What our crops cost in quality: pixels and MAE loss beside Pillow's bicubic, on photographs.

    python benchmarks/crops.py --json crops.json         # a minute or two on two cores
    python benchmarks/crops.py --quick

The same JPEGs and the same random resized crops go through both pipelines: ours (decoded at 1/2, 1/4 or 1/8 where the
crop is as many times larger than the target) and Pillow (decoded in full, cropped, `resize` bicubic with antialias). At
--px 224 nearly every crop is decoded in full; at --px 64 nearly every crop is decoded smaller. One MAE (4 blocks of
width 96), trained on Pillow's crops and then fixed, tells the loss on both, with the same masks; the difference is
that of pairs, with its standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # beside this script, however it was started
from loader import MEAN, STD, photographs

from livt_scale.config.recipe import Decoder, Model
from livt_scale.data.image.decode import open_image
from livt_scale.data.image.transforms import Box, cut, draw_crop, resize
from livt_scale.data.loader import normalise
from livt_scale.data.seeds import sample_rng
from livt_scale.models.mae import build_mae

BATCH = 64
QUALITY = 90


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--px", type=int, nargs="+", default=[224, 64], help="of a crop; patches are an eighth of 64")
    parser.add_argument("--steps", type=int, default=300, help="that the MAE is trained")
    parser.add_argument("--crops", type=int, default=512, help="that are compared")
    parser.add_argument("--quick", action="store_true", help="few crops and steps: figures without meaning")
    options = parser.parse_args(arguments)
    if options.quick:
        options.px, options.steps, options.crops = [64], 3, 32
    jpegs = [_jpeg(photo) for photo in photographs()]
    result = {str(px): compare(jpegs, px, steps=options.steps, crops=options.crops) for px in options.px}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def compare(jpegs: list[bytes], px: int, *, steps: int, crops: int) -> dict[str, Any]:
    model, training = _trained(jpegs, px, steps=steps)
    apart, losses, smaller = [], [], 0
    for first in range(0, crops, BATCH):
        boxes = [_box(jpegs, k, "compared") for k in range(first, min(first + BATCH, crops))]
        both = [torch.stack([make(jpegs[k], box, px) for k, box in boxes]) for make in (ours, pillow)]
        apart.append((both[0].int() - both[1].int()).abs().flatten(1).float())
        smaller += sum(min(box.height, box.width) >= 2 * px for _, box in boxes)
        noise = torch.from_numpy(np.random.default_rng(first).random((len(boxes), model[1]), dtype=np.float32))
        losses.append(torch.stack([_losses(model[0], images, noise) for images in both], dim=1))
    levels, loss = torch.cat(apart), torch.cat(losses)
    difference = loss[:, 0] - loss[:, 1]
    return {
        "crops": crops,
        "decoded_smaller": round(smaller / crops, 3),
        "levels_apart": {
            "mean": round(levels.mean().item(), 4),
            "share_over_2": round((levels > 2).float().mean().item(), 5),
            "max": int(levels.max()),
        },
        "psnr_db": round(10 * math.log10(255**2 / max((levels**2).mean().item(), 1e-9)), 2),
        "mae_loss": {
            "pillow": round(loss[:, 1].mean().item(), 5),
            "ours": round(loss[:, 0].mean().item(), 5),
            "difference": round(difference.mean().item(), 6),
            "standard_error": round(difference.std().item() / crops**0.5, 6),
        },
        "trained": {"steps": steps, "last_loss": round(training, 4)},
    }


def ours(jpeg: bytes, box: Box, px: int) -> torch.Tensor:
    """uint8 [3, px, px]"""
    slot = torch.empty((px, px, 3), dtype=torch.uint8).permute(2, 0, 1)
    resize(*cut(open_image(jpeg, channels=3), box, target_px=px), slot)
    return slot


def pillow(jpeg: bytes, box: Box, px: int) -> torch.Tensor:
    """uint8 [3, px, px]"""
    image = Image.open(io.BytesIO(jpeg)).crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return torch.from_numpy(np.array(image.resize((px, px), Image.Resampling.BICUBIC))).permute(2, 0, 1)


def _trained(jpegs: list[bytes], px: int, *, steps: int) -> tuple[tuple[torch.nn.Module, int], float]:
    torch.manual_seed(0)
    described = Model(size="vit_micro", image_px=px, patch_px=px // 8, decoder=Decoder(width=64, depth=2, heads=2))
    model = build_mae(described, norm_pix=True, mask_ratio=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    pool = torch.stack([pillow(jpegs[k], box, px) for k, box in (_box(jpegs, k, "trained") for k in range(8 * BATCH))])
    rng, last = np.random.default_rng(1), 0.0
    for _ in range(steps):
        images = normalise(pool[torch.from_numpy(rng.integers(len(pool), size=BATCH))], MEAN, STD, torch.float32)
        noise = torch.from_numpy(rng.random((BATCH, described.num_patches), dtype=np.float32))
        loss = model(images, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = loss.item()
    return (model.eval(), described.num_patches), last


@torch.inference_mode()
def _losses(model: torch.nn.Module, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    floats = normalise(images, MEAN, STD, torch.float32)
    return torch.stack([model(one[None], n[None]) for one, n in zip(floats, noise, strict=True)])


def _box(jpegs: list[bytes], k: int, purpose: str) -> tuple[int, Box]:
    """(number of the photograph, a crop of MAE's in it)"""
    number = k % len(jpegs)
    image = open_image(jpegs[number], channels=3)
    uniforms = sample_rng(0, 0, f"crop {k}", purpose).random(22).tolist()
    return number, draw_crop(image.height, image.width, scale=(0.2, 1.0), uniforms=uniforms)


def _jpeg(photo: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def table(result: dict[str, Any]) -> str:
    heads = f"{'px':<6}{'smaller':>8}{'levels apart':>14}{'over 2':>9}{'PSNR':>8}"
    lines = [f"{heads}{'MAE loss, Pillow':>18}{'ours less it':>22}"]
    for px, one in result.items():
        levels, loss = one["levels_apart"], one["mae_loss"]
        apart = f"{loss['difference']:+.5f} ± {loss['standard_error']:.5f}"
        lines.append(
            f"{px:<6}{one['decoded_smaller']:>8.0%}{levels['mean']:>14.3f}{levels['share_over_2']:>9.2%}"
            f"{one['psnr_db']:>8.1f}{loss['pillow']:>18.4f}{apart:>22}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
