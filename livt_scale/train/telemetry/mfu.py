"""The efficiency of a rank's device: model FLOP/s, their share of the peak (MFU), and peak memory.

    MFU = FLOPs of a training image · images/s of all ranks / (ranks · peak of a device)

FLOPs are the formula's (`plan.flops`, nothing computed twice counts), the peak is the table's (`plan.devices`) for the
recipe's precision, or `log.peak_tflops`. Where neither knows one, as on CPUs, MFU is None.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.plan.devices import named
from livt_scale.plan.flops import stage_flops

GIB = 2**30


@dataclass(frozen=True)
class Speed:
    """`peak_tflops`: of one device, None where unknown."""

    flops_per_image: int
    peak_tflops: float | None
    world_size: int

    def figures(self, images_per_s: float) -> dict[str, float | None]:
        """`tflops`: model TFLOP/s of one rank; `mfu`: their share of the peak. `images_per_s`: of all ranks."""
        tflops = self.flops_per_image * images_per_s / self.world_size / 1e12
        return {
            "tflops": _digits(tflops),
            "mfu": None if self.peak_tflops is None else _digits(tflops / self.peak_tflops),
        }


def speed_of(recipe: Recipe, stage: Stage, *, num_classes: int, device: torch.device, world_size: int) -> Speed:
    flops = stage_flops(recipe, stage, num_classes=num_classes)
    return Speed(flops.train, peak_tflops(recipe, device), world_size)


def peak_tflops(recipe: Recipe, device: torch.device) -> float | None:
    """The recipe's value, else the table's for this device and precision, else None."""
    if recipe.log.peak_tflops is not None:
        return recipe.log.peak_tflops
    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return known.peak_tflops(recipe.parallel.precision, tf32=tf32)


def memory_peak_gib(device: torch.device) -> float:
    """GPU: torch's peak allocation since the last call. CPU: the peak resident memory of the process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return round(peak / GIB, 4)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
