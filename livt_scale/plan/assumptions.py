"""The planner's assumptions: each number with its unit and its source; `--assume NAME=VALUE` changes it.

A custom device is a YAML file with a name and the fields of `Accelerator`; `--device my.yaml` reads it:

    {name: mine, peak_tflops: {bf16: 400, fp16: 400, fp32: 50}, memory_gib: 96, memory_gb_s: 3000, node_link_gb_s: 300,
     network_gb_s: 50, power_w: 500}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from livt_scale.config.yaml import parse, parse_value, validated
from livt_scale.plan.devices import DEVICES, Precision
from livt_scale.util.errors import UsageError, nearest
from livt_scale.util.outside import read_text

Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Assumptions(_Part):
    """Each can be overridden. One without a source is a round number that was not measured: calibrate it."""

    mfu: Annotated[float, Field(gt=0, le=1)] = Field(
        0.40, description="share of the device's peak that matrix products reach, exchange and recomputing aside"
    )
    block_us: NonNegativeFloat = Field(
        300, description="least time of a block, forward and backward, however small: its 50 or so kernels are launched"
    )
    overlap: Share = Field(0.8, description="share of the exchange that can hide behind computing (ddp, fsdp, zero3)")
    latency_us: NonNegativeFloat = Field(20, description="of one collective, times log2 of its ranks")
    reserve_gib: NonNegativeFloat = Field(2.0, description="of a device's memory for the driver, NCCL and libraries")
    fragmentation: NonNegativeFloat = Field(0.05, description="what the allocator loses, as a share of the peak")
    image_kib: PositiveFloat = Field(
        110, description="bytes of a stored image, where there are no shards (ImageNet's mean)"
    )
    decode_images_per_s: PositiveFloat = Field(
        400, description="one CPU core decodes and augments (two did 1248 to 2134, docs/benchmarks.md)"
    )
    storage_gb_s: PositiveFloat = Field(5, description="the shared file system writes and reads for this job")
    host_copy_gb_s: PositiveFloat = Field(10, description="of one device to its host's memory, for a save")
    host_gb_s: PositiveFloat = Field(200, description="a node's main memory, under AdamW of all its ranks (offload)")
    agree_ms: NonNegativeFloat = Field(
        72, description="ranks agree on a save, times log2 of their number (0.78 s on 1856, pytorch.org, April 2025)"
    )
    start_s: NonNegativeFloat = Field(120, description="from a job's start to its first step (slurm.start_s)")
    mtbf_node_days: PositiveFloat = Field(1000, description="mean time between failures of one node")
    power_overhead: Annotated[float, Field(ge=1)] = Field(
        1.5, description="a node's power and its cooling over that of its devices"
    )


class PeakTflops(_Part):
    """Dense TFLOP/s by arithmetic."""

    fp32: PositiveFloat
    fp16: PositiveFloat
    bf16: PositiveFloat | None = None


class Accelerator(_Part):
    """What is planned for. Links: one direction."""

    name: str
    peak_tflops: PeakTflops
    memory_gib: PositiveFloat
    memory_gb_s: PositiveFloat
    node_link_gb_s: PositiveFloat = Field(description="of one device to the others of its node")
    network_gb_s: PositiveFloat = Field(description="of one node to the others, all its adapters together")
    gpus_per_node: PositiveInt = 8
    power_w: PositiveFloat | None = Field(None, description="of one device under load; None: no energy is reported")


# One direction inside a node, GB/s a device; of a node outwards, GB/s; devices a node; board power, W. Links and power:
# the makers' data sheets (NVLink 2, 3, 4, 5: 150, 300, 450, 900; PCIe 4 and 5 x16: 32 and 64; Infinity Fabric of MI300X
# 7 x 64). Networks are what such nodes are usually sold with, one adapter a device where the node has NVLink.
_PLACES: dict[str, tuple[float, float, int, float]] = {
    "v100": (150, 12.5, 8, 300),
    "v100-pcie": (16, 12.5, 4, 250),
    "t4": (16, 6.25, 4, 70),
    "a100-40gb": (300, 200, 8, 400),
    "a100": (300, 200, 8, 400),
    "a40": (32, 25, 4, 300),
    "a10": (32, 12.5, 4, 150),
    "l40s": (32, 50, 4, 350),
    "l4": (16, 12.5, 4, 72),
    "rtx3090": (16, 1.25, 4, 350),
    "rtx4090": (32, 1.25, 4, 450),
    "h100": (450, 400, 8, 700),
    "h100-pcie": (64, 50, 4, 350),
    "h100-nvl": (300, 50, 4, 400),
    "h200": (450, 400, 8, 700),
    "b200": (900, 400, 8, 1000),
    "mi250x": (100, 100, 8, 280),
    "mi300x": (448, 400, 8, 750),
}


def accelerator(name: str) -> Accelerator:
    """One of the table, or the YAML file at a path. UsageError: what is wrong in it, and the nearest right name."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        return _from_file(Path(name))
    if name not in DEVICES:
        raise UsageError(
            f"no device is called {name!r}", remedy=f"{nearest(name, DEVICES)}; a YAML file describes others"
        )
    device = DEVICES[name]
    link, network, gpus, power = _PLACES[name]
    return Accelerator(
        name=name,
        peak_tflops=PeakTflops(fp32=device.tf32 or device.fp32, fp16=device.fp16, bf16=device.bf16),
        memory_gib=device.memory_gib,
        memory_gb_s=device.bandwidth_gb_s,
        node_link_gb_s=link,
        network_gb_s=network,
        gpus_per_node=gpus,
        power_w=power,
    )


def _from_file(path: Path) -> Accelerator:
    try:
        tree = parse(read_text(path, "profile"), path)
    except (OSError, ValueError) as error:
        raise UsageError(f"the device file {path} cannot be read: {error}") from error
    return validated(tree, path, Accelerator, strict=False)


def assume(changes: list[str]) -> tuple[Assumptions, frozenset[str]]:
    """The assumptions with `NAME=VALUE` laid over them, and which were changed. UsageError for one that cannot be."""
    values = {}
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign or name not in Assumptions.model_fields:
            raise UsageError(f"--assume {change!r}: give NAME=VALUE", remedy=nearest(name, Assumptions.model_fields))
        values[name] = parse_value(text)
    try:
        return Assumptions(**values), frozenset(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"--assume {first['loc'][0]}={first['input']}: {first['msg']}") from error


def peak_tflops(device: Accelerator, precision: Precision) -> float:
    """UsageError where the device has no such arithmetic."""
    peak = getattr(device.peak_tflops, precision)
    if peak is None:
        raise UsageError(f"{device.name} has no {precision}", remedy="--set parallel.precision=fp16")
    return float(peak)
