"""Published training times of ViTs against the planner's range: the table of docs/plan.md#published. No GPU, no torch.

    python benchmarks/published_times.py --page docs/plan.md --json published.json

Each run is described by its shapes, batch, devices and software, as its source gives them; nothing is fitted to one.
Those marked as used have set a constant (`livt_scale/plan/constants.py`, `Assumptions.overhead`).
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from livt_scale.plan.assumptions import Accelerator, Assumptions, accelerator
from livt_scale.plan.constants import Chip, End
from livt_scale.plan.exchange import Unit, exchange, links_of
from livt_scale.plan.kernels import (
    TENSORS_PER_BLOCK,
    Parts,
    Software,
    block_parts,
    elapsed_s,
    micro_batch,
    optimizer_parts,
)
from livt_scale.plan.memory import Spread
from livt_scale.plan.shapes import MLP_RATIO, BlockStack, Network, Product
from livt_scale.util.atomic import write_atomic

IMAGENET = 1_281_167
LAION_400M = 407_332_084  # images of an epoch, by the table of LAION-AI/scaling-laws-openclip
FP32_SHARE = 0.9  # of the peak that convolutions without tensor cores reach, a round number
MARKS = ("<!-- published: made by benchmarks/published_times.py -->", "<!-- published: end -->")
TORCH_1 = Software(fused_attention=False, adamw="loop")  # eager, AMP, attention and AdamW written out
TORCH_1_12 = Software(fused_attention=False, adamw="foreach")
XFORMERS = Software(adamw="foreach")
MEGATRON = Software(half=True)  # NeMo's bf16 O2: weights and residual stream in bf16, flash attention, fused AdamW
SIZES = {  # width, depth, heads, patch
    "S/16": (384, 12, 6, 16), "B/16": (768, 12, 12, 16), "L/16": (1024, 24, 16, 16), "B/32": (768, 12, 12, 32),
    "B/16+": (896, 12, 14, 16), "L/14": (1024, 24, 16, 14), "H/14": (1280, 32, 16, 14), "g/14": (1408, 40, 16, 14),
}  # fmt: skip
TEXTS = {"B/32": (512, 12, 8), "B/16": (512, 12, 8), "B/16+": (640, 12, 10), "L/14": (768, 12, 12)}
TEXTS |= {"H/14": (1024, 24, 16), "g/14": (1024, 24, 16)}
TEXT_TOKENS = 77
GIANT_MLP = 6144 / 1408


@dataclass(frozen=True)
class Pass:
    """A network that each image of a step goes through `views` times. trained: forward and backward."""

    network: Network
    views: float = 1.0
    trained: bool = True
    recompute: bool = False


@dataclass(frozen=True)
class Run:
    """One published time. images: of all epochs; batch: of one GPU. used: the constant that it set, if any."""

    name: str
    source: str
    hours: float
    device: str
    gpus: int
    batch: int
    images: float
    passes: tuple[Pass, ...]
    software: Software = TORCH_1
    per_node: int = 8
    network_gb_s: float | None = None
    sharded: bool = False
    fp32_gflop: float = 0.0  # of an image, besides: convolutions without AMP
    used: str = ""


def vit(size: str, *, px: int = 224, head: int = 1000, drop: bool = False) -> Network:
    width, depth, heads, patch = SIZES[size]
    tokens, ratio = 1 + (px // patch) ** 2, GIANT_MLP if size == "g/14" else MLP_RATIO
    blocks = BlockStack(tokens, width, heads, depth, tokens, ratio, drop)
    embed = Product(tokens - 1, 3 * patch**2, width, leads_back=False)
    return Network((blocks,), (embed, Product(1, width, head)), 3 * px**2)


def published_mae(size: str) -> Network:
    """As the public code computes it: all patches are embedded, all tokens are decoded and predicted."""
    width, depth, heads, patch = SIZES[size]
    patches, values = (224 // patch) ** 2, 3 * patch**2
    kept, tokens = patches // 4, 1 + patches
    blocks = BlockStack(1 + kept, width, heads, depth, 1 + kept), BlockStack(tokens, 512, 16, 8, tokens)
    outside = (
        Product(patches, values, width, leads_back=False),
        Product(1 + kept, width, 512),
        Product(tokens, 512, values),
    )
    return Network(blocks, outside, 3 * 224**2)


def clip(size: str, *, px: int = 224) -> Network:
    image = vit(size, px=px, head=SIZES[size][0])
    width, depth, heads = TEXTS[size]
    return replace(image, blocks=(*image.blocks, BlockStack(TEXT_TOKENS, width, heads, depth, TEXT_TOKENS)))


def self_distilled(size: str, *, local_px: int = 96, crops: int = 10, kept: float = 1.0) -> tuple[Pass, ...]:
    """DINO's: two crops through teacher and student, `crops` small ones through the student; `kept`: not dropped."""
    whole, small = vit(size, head=1), vit(size, px=local_px, head=1)
    passes = (Pass(whole, 2 * kept), Pass(whole, 2, trained=False))
    return (*passes, Pass(small, crops * kept)) if crops else passes


MAE_CODE, DINO, IBOT = (
    "facebookresearch/mae, PRETRAIN.md and FINETUNE.md",
    "arXiv 2104.14294, table 8",
    "arXiv 2111.07832, table 19",
)
CLIP_DOCS, CLIP_TABLE = "open_clip, docs/PRETRAINED.md", "LAION-AI/scaling-laws-openclip, trained_models_info.csv"
NEMO = "docs.nvidia.com/nemo-framework, performance of ViT and CLIP"
DVAE_GFLOP = 52.0  # BEiT's tokenizer, the encoder of DALL-E at 112 px, counted from its layers


def _mae_runs() -> list[Run]:
    def fine_tuned(size: str, epochs: int, batch: int, gpus: int, hours: float) -> Run:
        network = vit(size, drop=True)
        name = f"MAE fine-tuning ViT-{size}, {epochs} epochs"
        return Run(name, MAE_CODE, hours, "v100", gpus, batch, IMAGENET * epochs, (Pass(network),))

    probe = vit("B/16")
    return [
        Run("MAE ViT-L/16, 800 epochs", MAE_CODE, 42, "v100", 64, 64, IMAGENET * 800, (Pass(published_mae("L/16")),)),
        fine_tuned("B/16", 100, 32, 32, 7 + 11 / 60),
        fine_tuned("L/16", 50, 32, 32, 8 + 52 / 60),
        replace(fine_tuned("H/14", 50, 16, 64, 13 + 9 / 60), used="overhead"),
        Run(
            "MAE linear probe ViT-B/16, 90 epochs", MAE_CODE, 2 + 20 / 60, "v100", 32, 512, IMAGENET * 90,
            (Pass(probe, trained=False),),
        ),
    ]  # fmt: skip


def _deit_runs() -> list[Run]:
    source = "arXiv 2012.12877, section 6"
    plain = (Pass(vit("B/16", drop=True)),)
    large = (Pass(vit("B/16", px=384, drop=True)),)
    used = "volta.matmul"
    return [
        Run("DeiT-B, 300 epochs, one node", source, 53, "v100", 8, 128, IMAGENET * 300, plain, used=used),
        Run("DeiT-B, 300 epochs, two nodes", source, 37, "v100", 16, 64, IMAGENET * 300, plain),
        Run("DeiT-B at 384 px, 25 epochs", source, 20, "v100", 8, 64, IMAGENET * 25, large),
    ]


def _distilled_runs() -> list[Run]:
    def run(name: str, source: str, hours: float, passes: tuple[Pass, ...], **more: Any) -> Run:
        return Run(name, source, hours, "v100", 16, 64, IMAGENET * 100, passes, **more)

    runs = [
        run(f"DINO ViT-S/16, 2 × 224 + {n} × 96, 100 epochs", DINO, hours, self_distilled("S/16", crops=n), used=used)
        for n, hours, used in ((0, 15.3, "overhead"), (2, 17.0, ""), (6, 20.3, ""), (10, 24.2, ""))
    ]
    small = vit("S/16", head=8192)
    patches = replace(small, outside=(small.outside[0], Product(196, 384, 8192)))
    base = replace(vit("B/16"), outside=(vit("B/16").outside[0], Product(196, 768, 8192)))
    runs += [
        run("iBOT ViT-S/16, 2 × 224, 100 epochs", IBOT, 15.6, self_distilled("S/16", crops=0)),
        run("iBOT ViT-S/16, 2 × 224 + 10 × 96, 100 epochs", IBOT, 24.3, self_distilled("S/16")),
        run("BEiT ViT-S/16, 100 epochs", IBOT, 11.3, (Pass(patches),), fp32_gflop=DVAE_GFLOP),
        Run(
            "BEiT ViT-B/16, 800 epochs", "arXiv 2106.08254, section 2.5", 120, "v100", 16, 128, IMAGENET * 800,
            (Pass(base),), fp32_gflop=DVAE_GFLOP,
        ),
        Run(
            "MoCo v3 ViT-B/16, 100 epochs", "arXiv 2104.02057, section 6", 24, "v100", 128, 32, IMAGENET * 100,
            self_distilled("B/16", crops=0),
        ),
    ]  # fmt: skip
    return runs


def _clip_runs() -> list[Run]:
    juwels: dict[str, Any] = {"software": TORCH_1_12, "per_node": 4, "network_gb_s": 100}

    def run(size: str, source: str, hours: float, gpus: int, batch: int, images: float, **more: Any) -> Run:
        recompute = more.pop("recompute", False)
        px = more.pop("px", 224)
        passes = (Pass(clip(size, px=px), recompute=recompute),)
        name = f"open_clip ViT-{size}, {images / 1e9:.0f} billion"
        return Run(name, source, hours, "a100-40gb", gpus, batch, images, passes, **juwels, **more)

    def by_rate(size: str, rate: float, gpus: int, batch: int, images: float) -> Run:
        return run(size, CLIP_TABLE, images / rate / 3600, gpus, batch, images, recompute=True)

    epochs = 32 * LAION_400M
    return [
        run("B/32", CLIP_DOCS, 36, 128, 256, epochs),
        run("B/16", CLIP_DOCS, 61, 176, 192, epochs, used="overhead"),
        run("B/16+", CLIP_DOCS, 61, 224, 160, epochs, px=240),
        run("L/14", CLIP_DOCS, 127, 400, 96, epochs, recompute=True),
        by_rate("L/14", 27861.9, 384, 224, 32e9),
        by_rate("H/14", 34608, 824, 96, 256 * 135_646_078),
        by_rate("g/14", 24800, 800, 80, 90 * 135_646_078),
    ]


def _modern_runs() -> list[Run]:
    def nemo(name: str, network: Network, device: str, nodes: int, rate: float, used: str = "") -> Run:
        name = f"NeMo {name}, {nodes} node{'s' * (nodes > 1)}, 400 million"
        images = 400e6
        hours = images / rate / 3600
        return Run(name, NEMO, hours, device, 8 * nodes, 64, images, (Pass(network),), MEGATRON, used=used)

    readme = "facebookresearch/dinov2, README.md"
    long, short = (
        self_distilled(size, local_px=px, crops=8, kept=kept)
        for size, px, kept in (("L/14", 98, 0.6), ("L/16", 96, 0.7))
    )

    def dino(name: str, hours: float, gpus: int, batch: int, steps: int, passes: tuple[Pass, ...]) -> Run:
        images = steps * gpus * batch
        return Run(name, readme, hours, "a100", gpus, batch, images, passes, XFORMERS, sharded=True)

    return [
        nemo("ViT-g/14", vit("g/14"), "a100", 1, 693),
        nemo("ViT-g/14", vit("g/14"), "a100", 16, 10644),
        nemo("ViT-g/14", vit("g/14"), "h100", 1, 1428, "hopper.matmul"),
        nemo("ViT-g/14", vit("g/14"), "h100", 16, 21561),
        nemo("CLIP ViT-g/14", clip("g/14"), "a100", 1, 559),
        nemo("CLIP ViT-g/14", clip("g/14"), "h100", 1, 935),
        dino("DINOv2 ViT-L/16, ImageNet-1k", 24, 32, 64, 100 * 1250, short),
        dino("DINOv2 ViT-L/14, ImageNet-22k", 3.3 * 24, 96, 32, 500 * 1250, long),
    ]


RUNS: tuple[Run, ...] = (*_mae_runs(), *_deit_runs(), *_distilled_runs(), *_clip_runs(), *_modern_runs())


def planned_hours(run: Run, end: End) -> float:
    """By the planner's model and constants, at one end of the range."""
    device = accelerator(run.device)
    if run.network_gb_s is not None:
        device = device.model_copy(update={"network_gb_s": run.network_gb_s})
    assumed = Assumptions().at(end)
    chip = device.chip("fp16", end)
    computing, units = _computing(run, chip)
    update = _update(run, units, chip)
    step_s = elapsed_s([computing], chip, run.software) + elapsed_s([update], chip, run.software)
    step_s += run.batch * run.fp32_gflop * 1e9 / (device.peak_tflops.fp32 * 1e12 * FP32_SHARE)
    step_s += _exposed_s(run, units, device, assumed)
    return run.images / (run.batch * run.gpus) * step_s * (1 + assumed.overhead) / 3600


def _computing(run: Run, chip: Chip) -> tuple[Parts, list[Unit]]:
    """Of a step, and the blocks that are trained: their weights, and seconds of the first views."""
    total = Parts()
    units: list[Unit] = []
    for one in run.passes:
        images = max(1, round(run.batch * one.views))
        forward, backward = micro_batch(one.network, images, chip, run.software, recompute=one.recompute)
        total += forward + backward if one.trained else forward
        if one.trained and not units:
            units = [unit for blocks in one.network.blocks for unit in _units(blocks, images, chip, run, one.recompute)]
    return total, units


def _units(blocks: BlockStack, images: int, chip: Chip, run: Run, recompute: bool) -> list[Unit]:
    parts = block_parts(blocks, images, chip, run.software, recompute=recompute)
    forward_s, backward_s = (elapsed_s([part], chip, run.software) for part in parts)
    weights = sum(product.weights for product in blocks.products)
    return [Unit(weights, weights, forward_s, backward_s)] * blocks.depth


def _update(run: Run, units: Sequence[Unit], chip: Chip) -> Parts:
    weights = sum(unit.trained for unit in units) / (run.gpus if run.sharded else 1)
    return optimizer_parts(weights, TENSORS_PER_BLOCK * len(units), chip, run.software, clipped=True)


def _exposed_s(run: Run, units: Sequence[Unit], device: Accelerator, assumed: Assumptions) -> float:
    if not units:
        return 0.0
    links = links_of(device, assumed, per_node=min(run.per_node, run.gpus))
    spread = Spread("fsdp" if run.sharded else "ddp", run.gpus, "fp16", run.batch)
    return exchange(units, spread, links).exposed_s


def rows(runs: Sequence[Run] = RUNS) -> list[dict[str, Any]]:
    found = []
    for run in runs:
        low, likely, high = (planned_hours(run, end) for end in ("low", "likely", "high"))
        found.append(
            {
                "run": run.name, "source": run.source, "device": run.device, "gpus": run.gpus, "used": run.used,
                "low": low, "likely": likely, "high": high, "published": run.hours, "ratio": likely / run.hours,
                "inside": low <= run.hours <= high,
            }
        )  # fmt: skip
    return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    unused = [row for row in found if not row["used"]]
    errors = [abs(row["ratio"] - 1) for row in unused]
    return {
        "runs": len(found),
        "unused": len(unused),
        "inside_unused": sum(row["inside"] for row in unused) / len(unused),
        "median_error_unused": statistics.median(errors),
        "largest_range": max(row["high"] / row["low"] for row in found),
    }


def table(found: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| run | GPUs | planned, h | published, h | likely / published | used for | source |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in found:
        span = f"{_hours(row['low'])} – **{_hours(row['likely'])}** – {_hours(row['high'])}"
        ratio = f"{row['ratio']:.2f}{'' if row['inside'] else ', outside'}"
        cells = [
            row["run"], f"{row['gpus']} {row['device']}", span, _hours(row["published"]), ratio, row["used"] or "-",
            row["source"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    facts = summary(found)
    inside = round(facts["inside_unused"] * facts["unused"])
    lines += [
        "",
        f"Of the {facts['unused']} times that set no constant, {inside} ({facts['inside_unused']:.0%}) are between "
        "low and high; the median",
        f"difference from the likely value is {facts['median_error_unused']:.0%}. High is up to "
        f"{facts['largest_range']:.1f} times low.",
    ]
    return "\n".join(lines) + "\n"


def _hours(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_page(page: Path, text: str) -> None:
    """Replace what is between the marks of the page."""
    old = page.read_text()
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    if not pattern.search(old):
        raise SystemExit(f"{page} has no line {MARKS[0]!r} to write below")
    new = pattern.sub(lambda _: f"{MARKS[0]}\n\n{text}\n{MARKS[1]}", old)
    write_atomic(page, new.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Published training times of ViTs against the plan's.")
    parser.add_argument("--quick", action="store_true", help="the same: it is quick")
    parser.add_argument("--page", type=Path, metavar="FILE", help="replace the table in this page; None: print it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    found = rows()
    if args.page:
        write_page(args.page, table(found))
    else:
        print(table(found))
    if args.json:
        args.json.write_text(json.dumps({"rows": found, **summary(found)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
