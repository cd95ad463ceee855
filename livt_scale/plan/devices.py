"""Peak speeds and memory of accelerators: what MFU is measured against, and what the planner plans for.

Dense matrix products, without structured sparsity, from the vendors' data sheets; if a sheet has only the sparse
figure (twice as high), the table has half of it. A device that is not in the table has no peak: MFU is then null,
unless `log.peak_tflops` sets the divisor.

    named("NVIDIA H100 80GB HBM3")    -> DEVICES["h100"]
    named("NVIDIA H100 PCIe")         -> DEVICES["h100-pcie"]: the same chip, three quarters of the speed
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Device:
    """TFLOP/s (10^12) by arithmetic; None: the device has none. `memory_gib` is nominal: a little less is free."""

    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    memory_gib: int
    bandwidth_gb_s: int

    def peak_tflops(self, precision: Precision, *, tf32: bool = False) -> float | None:
        """Of matrix products in `precision`; `tf32`: where torch may round fp32 products' inputs to it."""
        if precision == "fp32":
            return self.tf32 if tf32 and self.tf32 is not None else self.fp32
        return self.bf16 if precision == "bf16" else self.fp16


DEVICES: dict[str, Device] = {
    # NVIDIA Tesla V100 data sheet (2018): SXM2 and PCIe; first tensor cores, fp16 alone
    "v100": Device(bf16=None, fp16=125, tf32=None, fp32=15.7, memory_gib=32, bandwidth_gb_s=900),
    "v100-pcie": Device(bf16=None, fp16=112, tf32=None, fp32=14, memory_gib=32, bandwidth_gb_s=900),
    # NVIDIA T4 data sheet (2018)
    "t4": Device(bf16=None, fp16=65, tf32=None, fp32=8.1, memory_gib=16, bandwidth_gb_s=300),
    # NVIDIA A100 data sheet (nvidia-1758950-r4): 40 GB and 80 GB SXM
    "a100-40gb": Device(bf16=312, fp16=312, tf32=156, fp32=19.5, memory_gib=40, bandwidth_gb_s=1555),
    "a100": Device(bf16=312, fp16=312, tf32=156, fp32=19.5, memory_gib=80, bandwidth_gb_s=2039),
    # NVIDIA A40, A10, L40S, L4 data sheets
    "a40": Device(bf16=149.7, fp16=149.7, tf32=74.8, fp32=37.4, memory_gib=48, bandwidth_gb_s=696),
    "a10": Device(bf16=125, fp16=125, tf32=62.5, fp32=31.2, memory_gib=24, bandwidth_gb_s=600),
    "l40s": Device(bf16=362, fp16=362, tf32=183, fp32=91.6, memory_gib=48, bandwidth_gb_s=864),
    "l4": Device(bf16=121, fp16=121, tf32=60, fp32=30.3, memory_gib=24, bandwidth_gb_s=300),
    # NVIDIA Ampere GA102 and Ada whitepapers, appendix A: products added up in fp32
    "rtx3090": Device(bf16=71, fp16=71, tf32=35.6, fp32=35.6, memory_gib=24, bandwidth_gb_s=936),
    "rtx4090": Device(bf16=165.2, fp16=165.2, tf32=82.6, fp32=82.6, memory_gib=24, bandwidth_gb_s=1008),
    # NVIDIA H100 data sheet: SXM, PCIe, NVL (sparse figures halved); H100 architecture whitepaper for PCIe
    "h100": Device(bf16=989.5, fp16=989.5, tf32=494.5, fp32=67, memory_gib=80, bandwidth_gb_s=3350),
    "h100-pcie": Device(bf16=756, fp16=756, tf32=378, fp32=51, memory_gib=80, bandwidth_gb_s=2000),
    "h100-nvl": Device(bf16=835.5, fp16=835.5, tf32=417.5, fp32=60, memory_gib=94, bandwidth_gb_s=3900),
    # NVIDIA H200 data sheet: SXM (sparse figures halved)
    "h200": Device(bf16=989.5, fp16=989.5, tf32=494.5, fp32=67, memory_gib=141, bandwidth_gb_s=4800),
    # NVIDIA HGX B200 data sheet, a GPU of eight (sparse figures halved)
    "b200": Device(bf16=2250, fp16=2250, tf32=1100, fp32=75, memory_gib=180, bandwidth_gb_s=7700),
    # AMD Instinct MI250X data sheet: torch sees each of its two dies as a separate device, so half of it
    "mi250x": Device(bf16=191.5, fp16=191.5, tf32=None, fp32=47.9, memory_gib=64, bandwidth_gb_s=1638),
    # AMD Instinct MI300X data sheet
    "mi300x": Device(bf16=1307.4, fp16=1307.4, tf32=653.7, fp32=163.4, memory_gib=192, bandwidth_gb_s=5300),
}

# What torch calls them (`torch.cuda.get_device_name`), the more special name first.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"H100 NVL", "h100-nvl"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100 80GB HBM3", "h100"),
    (r"H200(?! NVL)", "h200"),
    (r"\bB200", "b200"),
    (r"A100.*40GB", "a100-40gb"),
    (r"A100.*80GB", "a100"),
    (r"V100-PCIE", "v100-pcie"),
    (r"V100-SXM", "v100"),
    (r"\bT4\b", "t4"),
    (r"\bA40\b", "a40"),
    (r"\bA10\b", "a10"),
    (r"\bL40S\b", "l40s"),
    (r"\bL4\b", "l4"),
    (r"RTX 3090(?! Ti)", "rtx3090"),
    (r"RTX 4090(?! D| Laptop)", "rtx4090"),
    (r"MI250X", "mi250x"),
    (r"MI300X", "mi300x"),
)


def named(torch_name: str) -> Device | None:
    """The device that torch calls `torch_name`; None if it is not in the table: never a guess.

    None for a slice of a card (MIG): its name does not give its fraction of the peak for all arithmetic.
    """
    if re.search(r"\bMIG\b", torch_name):
        return None
    key = next((key for pattern, key in _NAMES if re.search(pattern, torch_name)), None)
    return None if key is None else DEVICES[key]
