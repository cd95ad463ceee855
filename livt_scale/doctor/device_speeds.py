"""What a device reaches in each part of a training step: a device file for `livt plan --device FILE`.

    livt doctor --bench --device-file here.yaml       # then: livt plan RECIPE --gpus 1 --device here.yaml

Each measured figure is the median of repetitions at the shapes of a ViT, for the constants of `plan.constants`:

    peak_tflops       products of a linear layer, forward and backward
    memory_gb_s       a stream through memory that is larger than caches
    memory            norms, GELU and residual sums, forward and backward: their bytes per second over that
    fused_attention   attention of 197 tokens, forward and backward: its operations per second over the peak
    host_us, gap_us   one small operation after another (the second on CPUs alone: there, the host is the device)

Links and networks are not measured by one process: the table's where the device is known, else round numbers.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from livt_scale.plan.devices import named
from livt_scale.plan.kernels import FUSED_BACKWARD, FUSED_TILE

WIDTH, TOKENS, HEAD = 768, 197, 64  # ViT-B at 224 px
IMAGES = {"cpu": 8, "cuda": 256}
STREAM_ELEMENTS = {"cpu": 2**25, "cuda": 2**29}
SMALL_OPERATIONS = 200
LEAST_REPETITIONS = 3
GIB = 2**30
# Bytes of a value of the residual stream that two norms, two sums and GELU of a block move in fp32, both ways.
STREAM_BYTES = 2 * (8 + 12 + 20 + 12) + 4 * (8 + 12)

Tree = dict[str, Any]


def measure(device: torch.device, *, seconds: float) -> Tree:
    """The device file as a tree. About `seconds` long; raises what torch raises where memory is too small."""
    each_s = seconds / 6
    kinds = [torch.float32, torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    speeds = {kind: _product_flops_s(device, kind, seconds=each_s / len(kinds)) for kind in kinds}
    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    low = torch.bfloat16 if torch.bfloat16 in speeds else torch.float32
    stream = _stream_bytes_s(device, seconds=each_s)
    small_s = _small_operation_s(device, seconds=each_s)
    constants: Tree = {
        "multiprocessors": _multiprocessors(device),
        "matmul": 1.0,
        "memory": _block_stream_bytes_s(device, seconds=each_s) / stream,
        "fused_attention": _attention_flops_s(device, low, seconds=each_s) / speeds[low],
        "host_us": 1e6 * small_s,
    }
    if device.type == "cpu":
        constants |= {"family": "cpu", "gap_us": 1e6 * small_s}
    elif known is not None:
        constants["family"] = known.family
    fp32 = speeds[torch.float32]
    return {
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU of {platform.node()}",
        "peak_tflops": {
            "fp32": fp32 / 1e12,
            "fp16": speeds.get(torch.float16, fp32) / 1e12,
            "bf16": speeds.get(torch.bfloat16, fp32) / 1e12,
        },
        "memory_gib": _memory_bytes(device) / GIB,
        "memory_gb_s": stream / 1e9,
        "node_link_gb_s": known.node_link_gb_s if known else 10.0,
        "network_gb_s": known.network_gb_s if known else 1.0,
        "gpus_per_node": max(torch.cuda.device_count(), 1) if device.type == "cuda" else 1,
        "constants": constants,
    }


def _product_flops_s(device: torch.device, kind: torch.dtype, *, seconds: float) -> float:
    rows = IMAGES[device.type] * TOKENS
    x, wide = (torch.randn(rows, columns, device=device, dtype=kind) for columns in (WIDTH, 4 * WIDTH))
    weight = torch.randn(4 * WIDTH, WIDTH, device=device, dtype=kind)

    def three() -> None:
        F.linear(x, weight)
        wide @ weight
        wide.t() @ x

    return 3 * 2 * rows * 4 * WIDTH * WIDTH / _median_s(three, device, seconds=seconds)


def _stream_bytes_s(device: torch.device, *, seconds: float) -> float:
    source = torch.ones(STREAM_ELEMENTS[device.type], device=device)
    target = torch.empty_like(source)
    taken = _median_s(lambda: torch.add(source, 1.0, out=target), device, seconds=seconds)
    return 2 * 4 * source.numel() / taken


def _block_stream_bytes_s(device: torch.device, *, seconds: float) -> float:
    images = IMAGES[device.type]
    x, hidden = (torch.randn(images, TOKENS, w, device=device, requires_grad=True) for w in (WIDTH, 4 * WIDTH))
    scale, shift = (torch.full((WIDTH,), value, device=device, requires_grad=True) for value in (1.0, 0.0))
    gradients = [torch.randn_like(x), torch.randn_like(hidden)]

    def work() -> None:
        y = x
        for _ in range(2):
            y = y + F.layer_norm(y, (WIDTH,), scale, shift)
        torch.autograd.grad([y, F.gelu(hidden)], [x, hidden, scale, shift], gradients)

    return STREAM_BYTES * x.numel() / _median_s(work, device, seconds=seconds)


def _attention_flops_s(device: torch.device, kind: torch.dtype, *, seconds: float) -> float:
    """Operations as `plan.kernels` counts them: over full tiles."""
    shape = (IMAGES[device.type], WIDTH // HEAD, TOKENS, HEAD)
    q, k, v = (torch.randn(shape, device=device, dtype=kind, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(q)

    def work() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), [q, k, v], gradient)

    padded = FUSED_TILE * -(-TOKENS // FUSED_TILE)
    flops = (1 + FUSED_BACKWARD) * 2 * 2 * shape[0] * shape[1] * padded**2 * HEAD
    return flops / _median_s(work, device, seconds=seconds)


def _small_operation_s(device: torch.device, *, seconds: float) -> float:
    few = torch.zeros(8, device=device)

    def work() -> None:
        value = few
        for _ in range(SMALL_OPERATIONS):
            value = value + 1.0

    return _median_s(work, device, seconds=seconds) / SMALL_OPERATIONS


def _median_s(work: Callable[[], object], device: torch.device, *, seconds: float) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()  # kernels are loaded, memory is taken
    wait()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < LEAST_REPETITIONS:
        begun = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return torch.get_num_threads()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
