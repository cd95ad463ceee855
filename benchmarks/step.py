"""One training step of the masked autoencoder: ours against the published forward pass, written out plainly.

    python benchmarks/step.py --json step.json          # ViT-B, batch 8, some minutes on two cores
    python benchmarks/step.py --compile                 # ours with torch.compile by block
    python benchmarks/step.py --quick                   # ViT-Ti, a few steps: does it run?

Both start from the same weights and see the same images and noise. The reference embeds all patches and drops most of
them afterwards, writes attention as two matrix products with a softmax between, restores the order of tokens,
predicts every patch and masks the loss, and steps AdamW tensor by tensor (arXiv 2111.06377 and its public code). Steps
are taken in turn, so that a busy machine slows both; the figure is the median. The losses must agree, or it fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from livt_scale.config.recipe import MODEL_SIZES, Model
from livt_scale.distributed.blocks import prepare_blocks
from livt_scale.models.mae import MaskedAutoencoder, build_mae
from livt_scale.optim import make_adamw, param_groups, set_lr

MASK_RATIO = 0.75
BETAS = (0.9, 0.95)
LR = 1e-5  # low: what rounding makes of two equal runs must stay small for the losses to be comparable
WARM_UP = 2  # steps that are not timed
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative difference of the losses, any step


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), with attention's matrix written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [3, B, heads, tokens, d]
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainAutoencoder(nn.Module):
    """The masked autoencoder step by step as published; parameters named alike, so one state dict serves both."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        width, depth, heads, self.patch_px = model.dims
        decoder, values = model.decoder, self.patch_px**2 * model.channels
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(model.channels, width, self.patch_px, self.patch_px)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + model.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + model.num_patches, decoder.width), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(PlainBlock(decoder.width, decoder.heads) for _ in range(decoder.depth))
        self.decoder_norm = nn.LayerNorm(decoder.width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder.width, values)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # [B, L, D]
        batch, num_patches, width = x.shape
        num_kept = int(num_patches * (1 - MASK_RATIO))
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        x = x.gather(1, order[:, :num_kept, None].expand(-1, -1, width))
        x = torch.cat(((self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))

        missing = self.mask_token.expand(batch, num_patches - num_kept, -1)
        patches = torch.cat((x[:, 1:], missing), dim=1).gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat((x[:, :1], patches), dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        prediction = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        is_masked = (back >= num_kept).float()  # 1 is left out
        target = self._normalised_patches(images)
        per_patch = (prediction.float() - target).square().mean(dim=-1)
        return (per_patch * is_masked).sum() / is_masked.sum()

    def _normalised_patches(self, images: Tensor) -> Tensor:
        batch, channels, height, _ = images.shape
        p, grid = self.patch_px, height // self.patch_px
        values = images.reshape(batch, channels, grid, p, grid, p)
        values = torch.einsum("nchpwq->nhwpqc", values).reshape(batch, grid**2, p * p * channels)
        mean, variance = values.mean(dim=-1, keepdim=True), values.var(dim=-1, keepdim=True)
        return (values - mean) / (variance + 1e-6) ** 0.5


class Contender:
    """A model with its optimizer; `step` takes one training step and returns (loss, seconds)."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, device: torch.device, precision: str
    ) -> None:
        self.model, self.optimizer, self.device, self.precision = model, optimizer, device, precision

    def step(self, images: Tensor, noise: Tensor) -> tuple[float, float]:
        self._wait()
        start = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = self.model(images, noise)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        return loss.item(), time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def contenders(model: Model, *, device: torch.device, precision: str, compiled: bool = False) -> dict[str, Contender]:
    """Both, from the same weights. Ours with fused attention and AdamW, the reference with neither."""
    torch.manual_seed(0)
    ours: MaskedAutoencoder = build_mae(model, norm_pix=True, mask_ratio=MASK_RATIO).to(device)
    prepare_blocks(ours, recompute=False, compiled=compiled)
    plain = PlainAutoencoder(model).to(device)
    plain.load_state_dict(ours.state_dict(), strict=True)
    groups = [param_groups(network, lr=LR, weight_decay=0.05, layer_decay=None) for network in (ours, plain)]
    fused = make_adamw(groups[0], betas=BETAS)
    set_lr(fused, LR)
    unfused = torch.optim.AdamW(groups[1], lr=LR, betas=BETAS, fused=False, foreach=False)
    return {
        "ours": Contender(ours, fused, device=device, precision=precision),
        "reference": Contender(plain, unfused, device=device, precision=precision),
    }


def measure(runners: dict[str, Contender], draw: Callable[[], tuple[Tensor, Tensor]], *, steps: int) -> dict[str, Any]:
    """Take `steps` timed steps of each in turn; medians and middle halves of seconds, losses, their difference."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    losses: dict[str, list[float]] = {name: [] for name in runners}
    for step in range(WARM_UP + steps):
        batch = draw()
        names = list(runners) if step % 2 else list(runners)[::-1]  # who goes first changes
        for name in names:
            loss, taken = runners[name].step(*batch)
            losses[name].append(loss)
            if step >= WARM_UP:
                seconds[name].append(taken)
    difference = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["reference"], strict=True))
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "step_s": medians,
        "step_s_middle_half": {name: _middle_half(taken) for name, taken in seconds.items()},
        "ratio": medians["reference"] / medians["ours"],
        "loss": {
            **{name: values[-1] for name, values in losses.items()},
            "largest_relative_difference": difference,
        },
    }


def _middle_half(values: list[float]) -> list[float]:
    if len(values) < 2:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def profile(runner: Contender, batch: tuple[Tensor, Tensor], *, top: int = 12) -> list[dict[str, Any]]:
    """The operations that take most of one of our steps: name, share of the time, calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = runner.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        runner.step(*batch)

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=own_time, reverse=True)
    total = sum(map(own_time, events)) or 1.0
    return [{"op": e.key, "share": own_time(e) / total, "calls": e.count} for e in events[:top]]


def conditions(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "size": args.size,
        "batch": args.batch,
        "steps": args.steps,
        "precision": args.precision,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiled": args.compile,
        "quick": args.quick,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_tables(found: dict[str, Any]) -> None:
    print(f"MAE step, {found['size']}, batch {found['batch']}, {found['precision']}, {found['threads']} threads,")
    print(f"{found['device']}, torch {found['torch']}; median of {found['steps']} interleaved steps\n")
    print(f"{'':10} {'s/step':>8} {'middle half':>17} {'last loss':>10}")
    for name, taken in found["step_s"].items():
        low, high = found["step_s_middle_half"][name]
        print(f"{name:10} {taken:8.3f} {low:8.3f} {high:8.3f} {found['loss'][name]:10.5f}")
    print(f"\nours is {found['ratio']:.2f} times as fast")
    print(f"losses differ by at most {found['loss']['largest_relative_difference']:.1e}\n")
    print("what is left of our step:")
    for row in found["profile"]:
        print(f"{row['share']:7.1%}  {row['op']} ({row['calls']} calls)")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="MAE training step: ours against the plain published forward.")
    parser.add_argument("--quick", action="store_true", help="a few steps of ViT-Ti: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--size", choices=sorted(MODEL_SIZES), help="default vit_b, quick vit_ti")
    parser.add_argument("--batch", type=int, help="images a step; default 8, quick 2")
    parser.add_argument("--steps", type=int, help="timed steps of each; default 15, quick 3")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="fp32")
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile by block, as parallel.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    for name, usual, quick in (("size", "vit_b", "vit_ti"), ("batch", 8, 2), ("steps", 15, 3)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    if args.batch < 1 or args.steps < 1:
        parser.error("--batch and --steps must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device = torch.device(args.device)
    model = Model(size=args.size)
    runners = contenders(model, device=device, precision=args.precision, compiled=args.compile)
    generator = torch.Generator().manual_seed(1)

    def draw() -> tuple[Tensor, Tensor]:
        images = torch.randn(args.batch, model.channels, model.image_px, model.image_px, generator=generator)
        return images.to(device), torch.rand(args.batch, model.num_patches, generator=generator).to(device)

    found = {**measure(runners, draw, steps=args.steps), **conditions(args, device)}
    found["profile"] = profile(runners["ours"], draw())
    print_tables(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if not found["loss"]["largest_relative_difference"] <= TOLERANCE[args.precision]:
        print("the losses do not agree: this compares two different computations", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
