"""How fast the ranks of an allocation exchange data and compute: what `livt doctor --bench` measures.

    all_reduce    all ranks together, by message size: seconds, and GB/s "on the bus": 2 (n - 1) / n · bytes / seconds,
                  the figure of nccl-tests, which does not depend on the number of ranks
    pairs         each rank with the next, round the ring, there and back: which link is slow
    compute       each rank alone, a matrix product: which device is slow

All ranks call each function, in the same order. Repetitions are agreed on, so that a slow network takes no longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from livt_scale.distributed.world import World

MAX_REPEATS = 50
SMALL_BYTES, LARGE_BYTES = 4, 16 * 2**20  # of a pair: latency, bandwidth


def sizes(world: World) -> list[int]:
    """Bytes of the messages: from latency alone to about the gradients of ViT-B, less where CPUs carry them."""
    return [4, 2**16, 2**20, 2**24, 2**28] if world.device.type == "cuda" else [4, 2**16, 2**20, 2**24]


def all_reduce_speeds(world: World, *, seconds: float) -> list[dict[str, float]]:
    """By message size `bytes`, `s` and `gb_s`; about `seconds` long in all."""
    found = []
    for num_bytes in sizes(world):
        message = torch.ones(num_bytes // 4, device=world.device)
        taken = _repeated(lambda message=message: dist.all_reduce(message), world, seconds / len(sizes(world)))  # type: ignore[misc]
        share = 2 * (world.world_size - 1) / world.world_size
        found.append({"bytes": num_bytes, "s": taken, "gb_s": share * num_bytes / taken / 1e9})
    return found


def pair_speeds(world: World, *, seconds: float) -> list[dict[str, Any]]:
    """On every rank, for each pair of the ring: `ranks`, `latency_s` one way, `gb_s`.

    Pairs that share no rank are measured simultaneously.
    """
    last = world.world_size - 1
    pairs = [(rank, rank + 1) for rank in range(last)] + ([(last, 0)] if last > 1 else [])
    rounds = [pairs[0:last:2], pairs[1:last:2], pairs[last:]]
    mine: list[dict[str, Any]] = []
    for together in filter(None, rounds):
        here = next((pair for pair in together if world.rank in pair), None)
        small, large = (
            _repeated(lambda n=n, here=here: _there_and_back(here, n, world), world, seconds / 6)  # type: ignore[misc]
            for n in (SMALL_BYTES, LARGE_BYTES)
        )
        if here is not None and world.rank == here[0]:
            mine.append({"ranks": list(here), "latency_s": small / 2, "gb_s": 2 * LARGE_BYTES / large / 1e9})
    return sorted((pair for some in world.peers.all_gather(mine) for pair in some), key=lambda pair: pair["ranks"])


def compute_speed(world: World, *, seconds: float) -> float:
    """TFLOP/s of this rank's device, every rank at work: fp32 on CPUs, bf16 on GPUs."""
    on_gpu = world.device.type == "cuda"
    width, kind = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    left = torch.ones(width, width, device=world.device, dtype=kind)
    taken = _repeated(lambda: torch.mm(left, left), world, seconds, own=True)
    return 2 * width**3 / taken / 1e12


def _there_and_back(pair: tuple[int, int] | None, num_bytes: int, world: World) -> None:
    if pair is None:
        return
    message = _message(num_bytes, world.device)
    other = pair[1] if world.rank == pair[0] else pair[0]
    first, second = (dist.send, dist.recv) if world.rank == pair[0] else (dist.recv, dist.send)
    first(message, other)
    second(message, other)


_messages: dict[tuple[int, torch.device], Tensor] = {}


def _message(num_bytes: int, device: torch.device) -> Tensor:
    """One for each size: making it is not what is timed."""
    return _messages.setdefault((num_bytes, device), torch.ones(num_bytes // 4, device=device))


def _repeated(work: Callable[[], object], world: World, seconds: float, *, own: bool = False) -> float:
    """Seconds of one `work()`: of the ranks' mean times, the longest; `own`: this rank's."""
    work()  # connections and buffers are made
    once = _longest(_timed(work, 1, world), world)
    repeats = max(1, min(MAX_REPEATS, int(seconds / max(once, 1e-6))))
    taken = _timed(work, repeats, world) / repeats
    return taken if own else _longest(taken, world)


def _timed(work: Callable[[], object], repeats: int, world: World) -> float:
    if world.world_size > 1:
        _longest(0.0, world)  # all begin together
    begun = time.perf_counter()
    for _ in range(repeats):
        work()
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter() - begun


def _longest(seconds: float, world: World) -> float:
    if world.world_size == 1:
        return seconds
    value = torch.tensor([seconds], dtype=torch.double, device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value.item())
