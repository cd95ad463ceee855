"""The planner's assumptions: each number with its unit and its source; `--assume NAME=VALUE` changes it.

A custom device is a YAML file with a name and the fields of `Accelerator`; `--device my.yaml` reads it. What it leaves
out of `constants` has a default and a wider range, and the plan names it:

    {name: mine, peak_tflops: {bf16: 400, fp16: 400, fp32: 50}, memory_gib: 96, memory_gb_s: 3000, node_link_gb_s: 300,
     network_gb_s: 50, power_w: 500, constants: {family: hopper, multiprocessors: 120, matmul: 0.7}}
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from livt_scale.config.runtime import RecipePart
from livt_scale.config.yaml import parse_value, read_file, validated
from livt_scale.plan.constants import (
    EFFICIENCIES,
    FAMILIES,
    MULTIPROCESSORS,
    Chip,
    Efficiency,
    End,
    Family,
    chip_at,
    measured,
)
from livt_scale.plan.devices import DEVICES, Precision
from livt_scale.util.errors import UsageError, nearest


class Assumptions(RecipePart):
    """Each can be overridden. One without a source is a round number that was not measured: calibrate it."""

    overhead: NonNegativeFloat = Field(
        0.25, description="of a run over its steps: ranks that wait for each other, evaluation, hiccups; a share"
    )
    link_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.85, description="of links and networks that collectives reach"
    )
    latency_us: NonNegativeFloat = Field(20, description="of one collective, times log2 of its ranks")
    reserve_gib: NonNegativeFloat = Field(2.0, description="of a device's memory for the driver, NCCL and libraries")
    fragmentation: NonNegativeFloat = Field(0.05, description="what the allocator loses, as a share of the peak")
    image_kib: PositiveFloat = Field(
        110, description="bytes of a stored image, where there are no shards (ImageNet's mean)"
    )
    decode_images_per_s: PositiveFloat = Field(
        400, description="one CPU core decodes and augments (two did 1248 to 2134; livt shards bench measures it)"
    )
    cores_per_gpu: PositiveFloat = Field(
        12, description="CPU cores of a node for each of its devices; data.workers of them decode"
    )
    node_memory_gib: PositiveFloat = Field(512, description="of a node's memory that caches files")
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

    def at(self, end: End) -> Assumptions:
        """At one end of the hours; what was given (`assume`) stays."""
        if end == "likely":
            return self
        given = self.model_fields_set
        moved = {name: ends[end == "high"] for name, ends in RANGES.items() if name not in given}
        return self.model_construct(_fields_set=given, **{**dict(self), **moved})  # what is moved is not given


# The best and worst value of an assumption that was not changed: (for low hours, for high hours).
RANGES: dict[str, tuple[float, float]] = {
    "overhead": (0.05, 0.7),
    "link_share": (0.92, 0.5),
    "latency_us": (10, 40),
    "decode_images_per_s": (600, 300),
    "storage_gb_s": (10, 2.5),
}


class PeakTflops(RecipePart):
    """Dense TFLOP/s by arithmetic."""

    fp32: PositiveFloat
    fp16: PositiveFloat
    bf16: PositiveFloat | None = None


class DeviceConstants(RecipePart):
    """Measured on the device: see `plan.constants.Efficiency`. None: the family's, which `family` names."""

    family: Family | None = None
    multiprocessors: PositiveInt | None = None
    matmul: PositiveFloat | None = None
    memory: PositiveFloat | None = None
    fused_attention: PositiveFloat | None = None
    unaligned: PositiveFloat | None = None
    host_us: PositiveFloat | None = None
    host_compiled_us: PositiveFloat | None = None
    gap_us: PositiveFloat | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """What has a default."""
        if self.family is not None:
            return () if self.multiprocessors else ("multiprocessors",)
        return tuple(name for name in type(self).model_fields if getattr(self, name) is None and name != "family")

    @property
    def efficiency(self) -> Efficiency:
        base = FAMILIES[self.family or "unknown"]
        given: dict[str, Any] = {
            name: measured(value, more_is_better=not name.endswith("_us"))
            for name in EFFICIENCIES
            if (value := getattr(self, name)) is not None
        }
        return replace(base, **given)


class Accelerator(RecipePart):
    """What is planned for. Links: one direction."""

    name: str
    peak_tflops: PeakTflops
    memory_gib: PositiveFloat
    memory_gb_s: PositiveFloat
    node_link_gb_s: PositiveFloat = Field(description="of one device to the others of its node")
    network_gb_s: PositiveFloat = Field(description="of one node to the others, all its adapters together")
    gpus_per_node: PositiveInt = 8
    power_w: PositiveFloat | None = Field(None, description="of one device under load; None: no energy is reported")
    constants: DeviceConstants = DeviceConstants()

    def chip(self, precision: Precision, end: End) -> Chip:
        return chip_at(
            end, self.constants.efficiency, peak=peak_tflops(self, precision), memory_gb_s=self.memory_gb_s,
            multiprocessors=self.constants.multiprocessors or MULTIPROCESSORS,
        )  # fmt: skip


def accelerator(name: str) -> Accelerator:
    """One of the table, or the YAML file at a path. UsageError: what is wrong in it, and the nearest right name."""
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(name)
        return validated(read_file(path, "profile", what="device file"), path, Accelerator, strict=False)
    if name not in DEVICES:
        raise UsageError(
            f"no device is called {name!r}", remedy=f"{nearest(name, DEVICES)}; a YAML file describes others"
        )
    device = DEVICES[name]
    return Accelerator(
        name=name,
        peak_tflops=PeakTflops(fp32=device.tf32 or device.fp32, fp16=device.fp16, bf16=device.bf16),
        memory_gib=device.memory_gib,
        memory_gb_s=device.bandwidth_gb_s,
        node_link_gb_s=device.node_link_gb_s,
        network_gb_s=device.network_gb_s,
        gpus_per_node=device.gpus_per_node,
        power_w=device.power_w,
        constants=DeviceConstants(family=device.family, multiprocessors=device.multiprocessors),
    )


def assumptions(changes: list[str]) -> Assumptions:
    """The defaults, changed by `NAME=VALUE`. UsageError for a change that cannot be."""
    values = {}
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign or name not in Assumptions.model_fields:
            raise UsageError(f"--assume {change!r}: give NAME=VALUE", remedy=nearest(name, Assumptions.model_fields))
        values[name] = parse_value(text)
    try:
        return Assumptions(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"--assume {first['loc'][0]}={first['input']}: {first['msg']}") from error


def peak_tflops(device: Accelerator, precision: Precision) -> float:
    """UsageError where the device has no such arithmetic."""
    peak = getattr(device.peak_tflops, precision)
    if peak is None:
        raise UsageError(f"{device.name} has no {precision}", remedy="--set parallel.precision=fp16")
    return float(peak)
