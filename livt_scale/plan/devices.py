"""Accelerators by name: peak speeds, memory, links. What MFU is measured against, and what plans are made for.

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

from livt_scale.plan.constants import Family

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Device:
    """TFLOP/s (10^12) by arithmetic; None: the device has none. `memory_gib` is nominal: a little less is free.

    multiprocessors: SMs or compute units. node_link_gb_s: of one device to the others of its node, one direction.
    network_gb_s: of a node to the others, all its adapters together, one direction. power_w: of the board.
    """

    family: Family
    multiprocessors: int
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    memory_gib: int
    bandwidth_gb_s: int
    node_link_gb_s: float
    network_gb_s: float
    gpus_per_node: int
    power_w: float

    def peak_tflops(self, precision: Precision, *, tf32: bool = False) -> float | None:
        """Of matrix products in `precision`; `tf32`: where torch may round fp32 products' inputs to it."""
        if precision == "fp32":
            return self.tf32 if tf32 and self.tf32 is not None else self.fp32
        return self.bf16 if precision == "bf16" else self.fp16


# Links: NVLink 2, 3, 4, 5: 150, 300, 450, 900 GB/s; PCIe 4 and 5 x16: 32 and 64; Infinity Fabric of MI300X 7 x 64.
# Networks are what such nodes are usually sold with, one adapter a device where the node has NVLink.
# fmt: off
DEVICES: dict[str, Device] = {
    # NVIDIA Tesla V100 data sheet (2018): SXM2 and PCIe; first tensor cores, fp16 alone
    "v100": Device(
        family="volta", multiprocessors=80,
        bf16=None, fp16=125, tf32=None, fp32=15.7, memory_gib=32, bandwidth_gb_s=900,
        node_link_gb_s=150, network_gb_s=12.5, gpus_per_node=8, power_w=300,
    ),
    "v100-16gb": Device(
        family="volta", multiprocessors=80,
        bf16=None, fp16=125, tf32=None, fp32=15.7, memory_gib=16, bandwidth_gb_s=900,
        node_link_gb_s=150, network_gb_s=12.5, gpus_per_node=8, power_w=300,
    ),
    "v100-pcie": Device(
        family="volta", multiprocessors=80,
        bf16=None, fp16=112, tf32=None, fp32=14, memory_gib=32, bandwidth_gb_s=900,
        node_link_gb_s=16, network_gb_s=12.5, gpus_per_node=4, power_w=250,
    ),
    # NVIDIA T4 data sheet (2018)
    "t4": Device(
        family="turing", multiprocessors=40,
        bf16=None, fp16=65, tf32=None, fp32=8.1, memory_gib=16, bandwidth_gb_s=300,
        node_link_gb_s=16, network_gb_s=6.25, gpus_per_node=4, power_w=70,
    ),
    # NVIDIA A100 data sheet (nvidia-1758950-r4): 40 GB and 80 GB SXM
    "a100-40gb": Device(
        family="ampere", multiprocessors=108,
        bf16=312, fp16=312, tf32=156, fp32=19.5, memory_gib=40, bandwidth_gb_s=1555,
        node_link_gb_s=300, network_gb_s=200, gpus_per_node=8, power_w=400,
    ),
    "a100": Device(
        family="ampere", multiprocessors=108,
        bf16=312, fp16=312, tf32=156, fp32=19.5, memory_gib=80, bandwidth_gb_s=2039,
        node_link_gb_s=300, network_gb_s=200, gpus_per_node=8, power_w=400,
    ),
    # NVIDIA A40, A10, L40S, L4 data sheets
    "a40": Device(
        family="ga10x", multiprocessors=84,
        bf16=149.7, fp16=149.7, tf32=74.8, fp32=37.4, memory_gib=48, bandwidth_gb_s=696,
        node_link_gb_s=32, network_gb_s=25, gpus_per_node=4, power_w=300,
    ),
    "a10": Device(
        family="ga10x", multiprocessors=72,
        bf16=125, fp16=125, tf32=62.5, fp32=31.2, memory_gib=24, bandwidth_gb_s=600,
        node_link_gb_s=32, network_gb_s=12.5, gpus_per_node=4, power_w=150,
    ),
    "l40s": Device(
        family="ada", multiprocessors=142,
        bf16=362, fp16=362, tf32=183, fp32=91.6, memory_gib=48, bandwidth_gb_s=864,
        node_link_gb_s=32, network_gb_s=50, gpus_per_node=4, power_w=350,
    ),
    "l4": Device(
        family="ada", multiprocessors=58,
        bf16=121, fp16=121, tf32=60, fp32=30.3, memory_gib=24, bandwidth_gb_s=300,
        node_link_gb_s=16, network_gb_s=12.5, gpus_per_node=4, power_w=72,
    ),
    # NVIDIA Ampere GA102 and Ada whitepapers, appendix A: products added up in fp32
    "rtx3090": Device(
        family="ga10x", multiprocessors=82,
        bf16=71, fp16=71, tf32=35.6, fp32=35.6, memory_gib=24, bandwidth_gb_s=936,
        node_link_gb_s=16, network_gb_s=1.25, gpus_per_node=4, power_w=350,
    ),
    "rtx4090": Device(
        family="ada", multiprocessors=128,
        bf16=165.2, fp16=165.2, tf32=82.6, fp32=82.6, memory_gib=24, bandwidth_gb_s=1008,
        node_link_gb_s=32, network_gb_s=1.25, gpus_per_node=4, power_w=450,
    ),
    # NVIDIA H100 data sheet: SXM, PCIe, NVL (sparse figures halved); H100 architecture whitepaper for PCIe
    "h100": Device(
        family="hopper", multiprocessors=132,
        bf16=989.5, fp16=989.5, tf32=494.5, fp32=67, memory_gib=80, bandwidth_gb_s=3350,
        node_link_gb_s=450, network_gb_s=400, gpus_per_node=8, power_w=700,
    ),
    "h100-pcie": Device(
        family="hopper", multiprocessors=114,
        bf16=756, fp16=756, tf32=378, fp32=51, memory_gib=80, bandwidth_gb_s=2000,
        node_link_gb_s=64, network_gb_s=50, gpus_per_node=4, power_w=350,
    ),
    "h100-nvl": Device(
        family="hopper", multiprocessors=132,
        bf16=835.5, fp16=835.5, tf32=417.5, fp32=60, memory_gib=94, bandwidth_gb_s=3900,
        node_link_gb_s=300, network_gb_s=50, gpus_per_node=4, power_w=400,
    ),
    # NVIDIA H200 data sheet: SXM (sparse figures halved)
    "h200": Device(
        family="hopper", multiprocessors=132,
        bf16=989.5, fp16=989.5, tf32=494.5, fp32=67, memory_gib=141, bandwidth_gb_s=4800,
        node_link_gb_s=450, network_gb_s=400, gpus_per_node=8, power_w=700,
    ),
    # NVIDIA GH200 data sheet: one with 96 GB of HBM3, on a node of four (sparse figures halved)
    "gh200": Device(
        family="hopper", multiprocessors=132,
        bf16=989.5, fp16=989.5, tf32=494.5, fp32=67, memory_gib=96, bandwidth_gb_s=4000,
        node_link_gb_s=450, network_gb_s=200, gpus_per_node=4, power_w=700,
    ),
    # NVIDIA HGX B200 data sheet, a GPU of eight (sparse figures halved)
    "b200": Device(
        family="blackwell", multiprocessors=148,
        bf16=2250, fp16=2250, tf32=1100, fp32=75, memory_gib=180, bandwidth_gb_s=7700,
        node_link_gb_s=900, network_gb_s=400, gpus_per_node=8, power_w=1000,
    ),
    # AMD Instinct MI250X data sheet: torch sees each of its two dies as a separate device, so half of it
    "mi250x": Device(
        family="cdna2", multiprocessors=110,
        bf16=191.5, fp16=191.5, tf32=None, fp32=47.9, memory_gib=64, bandwidth_gb_s=1638,
        node_link_gb_s=100, network_gb_s=100, gpus_per_node=8, power_w=280,
    ),
    # AMD Instinct MI300X data sheet
    "mi300x": Device(
        family="cdna3", multiprocessors=304,
        bf16=1307.4, fp16=1307.4, tf32=653.7, fp32=163.4, memory_gib=192, bandwidth_gb_s=5300,
        node_link_gb_s=448, network_gb_s=400, gpus_per_node=8, power_w=750,
    ),
}
# fmt: on

# What torch calls them (`torch.cuda.get_device_name`), the more special name first.
_NAMES: tuple[tuple[str, str], ...] = (
    (r"H100 NVL", "h100-nvl"),
    (r"H100 PCIe", "h100-pcie"),
    (r"H100 80GB HBM3", "h100"),
    (r"\bH200(?! NVL)", "h200"),
    (r"GH200 (?!144G)", "gh200"),
    (r"\bB200", "b200"),
    (r"A100.*40GB", "a100-40gb"),
    (r"A100.*80GB", "a100"),
    (r"V100-PCIE", "v100-pcie"),
    (r"V100-SXM.*16GB", "v100-16gb"),
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
