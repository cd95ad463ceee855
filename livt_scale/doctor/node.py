"""`livt doctor --node FOLDER`: a quick check of one node, before the tasks of a batch job start there.

Started once on each node. FOLDER/NODE then holds "ok", or a line for each thing that would fail; a node that writes no
file did not get even this far. FOLDER is in the run directory, so writing the file is the first check. The checks take
seconds: torch imports, the GPUs from Slurm are visible, empty, compute correctly and equally fast, the driver reports
no fault of theirs (`nvidia_smi.py`), gloo and the JPEG decoder work, /dev/shm can hold a batch.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from livt_scale.doctor import checks, nvidia_smi
from livt_scale.doctor.finding import Finding
from livt_scale.util.atomic import write_atomic

MIB = 2**20
MIN_SHARED_BYTES = 64 * MIB  # docker's default, in which no batch of photographs is handed over
MAX_TAKEN = 0.1  # of a GPU's memory, before anything of ours is there: a driver's own share is 1 to 2 %
SIDE = 1024  # of the matrices that are multiplied exactly
LARGE_SIDE = 8192  # of those that are timed: 2 ms on an H100
PRODUCTS = 30


def look_at_node(folder: Path, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Check the node and write its problems to FOLDER/NODE atomically. Returns problems and notes.

    OSError: the file cannot be written.
    """

    def gpus() -> list[Finding]:  # a check that fails is called by its function's name
        return [judge_given_gpus(int(environ.get("SLURM_GPUS_ON_NODE") or 0), seen_gpus())]

    looks = (gpus, _each_gpu, _driver, checks._collectives, checks._jpeg, _shared_memory)
    findings = [f for f in checks.examine(looks) if f.status != "ok"]
    problems = "\n".join(f"{f.name}: {f.message}" for f in findings if f.status == "problem") or "ok"
    write_atomic(folder / (environ.get("SLURMD_NODENAME") or socket.gethostname()), f"{problems}\n".encode())
    return findings


def judge_given_gpus(given: int, seen: int) -> Finding:
    if seen < given:
        return Finding("gpus", "problem", f"Slurm gave this job {given} GPUs here, and torch sees {seen}")
    return Finding("gpus", "ok", f"{seen} of {given}")


def judge_gpu(name: str, *, free: int, total: int, is_right: bool) -> Finding:
    """free, total: bytes of its memory. is_right: a product of whole numbers came out exact."""
    taken = 1 - free / total
    if not is_right:
        return Finding(name, "problem", "a product of whole numbers came out wrong")
    if taken > MAX_TAKEN:
        return Finding(
            name, "problem", f"{taken:.0%} of its memory is taken already: by a process that was left behind?"
        )
    return Finding(name, "ok", f"{free / 2**30:.0f} GiB free")


def judge_shared(free: int | None) -> Finding:
    if free is not None and free < MIN_SHARED_BYTES:
        return Finding("shared memory", "problem", f"{free / MIB:.0f} MiB free in /dev/shm, less than a batch takes")
    return Finding("shared memory", "ok", "")


def seen_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _driver() -> list[Finding]:
    return nvidia_smi.look(product_seconds())


def _shared_memory() -> list[Finding]:
    return [judge_shared(checks.free_shared_memory())]


def _each_gpu() -> list[Finding]:
    import torch

    found = []
    for k in range(seen_gpus()):
        free, total = torch.cuda.mem_get_info(k)
        found.append(
            judge_gpu(f"gpu {k}", free=free, total=total, is_right=multiplies_exactly(torch.device("cuda", k)))
        )
    return found


def multiplies_exactly(device: object) -> bool:
    """Products of numbers from 0 to 7 stay below 2^24, so that any order, and TF32 too, gives them exactly."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 8, (SIDE, SIDE), generator=generator).float() for _ in range(2))
    product = (a.to(device) @ b.to(device)).cpu()  # type: ignore[call-overload]
    return bool(torch.equal(product.double(), a.double() @ b.double()))


def product_seconds() -> dict[str, float]:
    """The median time of a large bf16 product on each GPU that torch sees, by its UUID; one GPU after another."""
    import torch

    taken = {}
    for k in range(seen_gpus()):
        a = torch.ones(LARGE_SIDE, LARGE_SIDE, device=torch.device("cuda", k), dtype=torch.bfloat16)
        seconds = []
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            a @ a
            torch.cuda.synchronize(k)
            seconds.append(time.perf_counter() - began)
        taken[str(torch.cuda.get_device_properties(k).uuid)] = statistics.median(
            seconds[PRODUCTS // 3 :]
        )  # the first ones wake the GPU
    return taken
