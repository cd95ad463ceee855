"""What this machine has, and what would not work here: the checks of `livt doctor`.

A check looks (`_memory`) and hands plain numbers to a function that judges (`judge_memory`), so that the judgement is
tested without the machine. Each returns findings; only a problem makes the exit code 1.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from livt_scale.distributed.process_setup import MAX_OPEN_FILES, max_ranks, open_files
from livt_scale.doctor.finding import Finding
from livt_scale.util.atomic import lock_works
from livt_scale.util.resources import shipped

GIB = 2**30
# What `make test` runs with: constraints.txt, which an installed package does not have beside it.
TESTED = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "timm": "1.0.31",
    "webdataset": "1.0.2",
    "accelerate": "1.15.0",
    "deepspeed": "0.19.8",
    "pydantic": "2.14.3",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "simplejpeg": "1.9.0",
}
MIN_RANKS = 512  # that an ordinary limit of open files is enough for
CGROUP = Path("/sys/fs/cgroup")
SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sacct", "scancel")


def examine(checks: Sequence[Callable[[], list[Finding]]] | None = None) -> list[Finding]:
    """Run each check in turn; without `checks`, all. An unexpected exception is a problem too, not a traceback."""
    findings: list[Finding] = []
    for check in CHECKS if checks is None else checks:
        try:
            with warnings.catch_warnings():  # a driver's complaint belongs into the finding, not between the lines
                warnings.simplefilter("ignore")
                findings += check()
        except Exception as error:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(Finding(name, "problem", f"the check itself failed: {type(error).__name__}: {error}"))
    return findings


# --- judging: pure functions ---


def judge_python(version: tuple[int, int]) -> Finding:
    said = f"{version[0]}.{version[1]}"
    if version < (3, 11):
        return Finding("python", "problem", f"{said}: too old", "install Python 3.11 or newer")
    if version > (3, 11):
        return Finding("python", "note", f"{said}; the tests run with 3.11")
    return Finding("python", "ok", said)


def judge_library(name: str, installed: str | None, *, wanted: str, tested: str | None) -> Finding:
    """`wanted` is a version specifier as in pyproject.toml, `>=2.11`; `tested` None: any version that is wanted."""
    from packaging.specifiers import SpecifierSet

    if installed is None:
        return Finding(
            name, "problem", f"not installed; needed: {wanted or 'any version'}", "make quickstart, or pip install -e ."
        )
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        return Finding(name, "problem", f"{installed}; needed: {wanted}", f"pip install '{name}{wanted}'")
    if tested and installed.split("+")[0] != tested:  # "2.14.1+cpu" is 2.14.1
        return Finding(name, "note", f"{installed}; tested with {tested}")
    return Finding(name, "ok", installed)


def judge_memory(total: int, available: int) -> Finding:
    said = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}"
    if available < 3 * GIB:
        return Finding(
            "memory", "note", f"{said}: the quickstart takes about 2", "end other programs, or --set data.workers=0"
        )
    return Finding("memory", "ok", said)


def judge_shared_memory(free: int | None) -> Finding:
    if free is None:
        return Finding(
            "shared memory", "note", "no /dev/shm: loader processes cannot hand over batches", "--set data.workers=0"
        )
    if free < GIB:
        message = f"{free / GIB:.1f} GiB free in /dev/shm: loader processes hand their batches over there"
        fix = "give the container more (docker run --shm-size=8g), or --set data.workers=0"
        return Finding("shared memory", "note", message, fix)
    return Finding("shared memory", "ok", f"{free / GIB:.1f} GiB free in /dev/shm")


def judge_open_files(soft: int, hard: int) -> Finding:
    limit = min(hard, MAX_OPEN_FILES)
    said = f"limit {soft}, raised to {limit} by each rank: enough for {max_ranks(limit)} ranks"
    if max_ranks(limit) < MIN_RANKS:
        return Finding("open files", "note", said, "raise the hard limit (ulimit -Hn) for runs of more ranks")
    return Finding("open files", "ok", said)


def judge_disk(free: int, *, folder: str, writable: bool) -> Finding:
    said = f"{free / GIB:.1f} GiB free in {folder}"
    if not writable:
        return Finding("disk", "note", f"{said}, but nothing can be written there", "give run_dir a folder of yours")
    if free < 2 * GIB:
        return Finding("disk", "note", f"{said}: checkpoints need room", "free some, or --set run_dir=… elsewhere")
    return Finding("disk", "ok", said)


def judge_locks(works: bool, *, folder: str) -> Finding:
    if not works:
        message = f"the file system of {folder} has no flock, which a run directory and `shards build` need"
        return Finding("locks", "problem", message, "work on another file system, or set LIVT_LOCK=file")
    return Finding("locks", "ok", f"files in {folder} can be locked")


def judge_compiler(path: str | None, *, has_gpu: bool) -> Finding:
    if path is None and has_gpu:
        message = "no C compiler on the PATH: parallel.compile needs one"
        return Finding("compiler", "note", message, "load your site's gcc module, or --set parallel.compile=false")
    return Finding("compiler", "ok", path or "none; parallel.compile is for GPUs")


def judge_slurm(found: list[str]) -> Finding:
    missing = [c for c in SLURM_COMMANDS if c not in found]
    if not found:
        return Finding("slurm", "note", "no Slurm commands on the PATH: runs here start with livt train or torchrun")
    if missing:
        message = f"on the PATH: {', '.join(found)}; not: {', '.join(missing)}"
        return Finding("slurm", "note", message, "load your site's Slurm module")
    return Finding("slurm", "ok", ", ".join(found))


# --- looking ---


def _python() -> list[Finding]:
    return [judge_python(sys.version_info[:2])]


def _libraries() -> list[Finding]:
    """The package's requirements, compared with the installed versions."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires("livt-scale") or []]
    except metadata.PackageNotFoundError:
        return [
            Finding("livt-scale", "problem", "not installed in this Python", "make quickstart, or pip install -e .")
        ]
    needed = {r.name.lower(): str(r.specifier) for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})}
    findings = [judge_library(n, _version(n), wanted=w, tested=TESTED.get(n)) for n, w in needed.items()]
    plain = [f for f in findings if f.status == "ok" and f.name not in TESTED]
    shown = [f for f in findings if f not in plain]
    return [*shown, Finding("other libraries", "ok", ", ".join(f"{f.name} {f.message}" for f in plain))]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processors() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    capability = torch.backends.cpu.get_cpu_capability()
    said = f"{cores} cores, {platform.machine()}, {capability}"
    if "AVX512" not in capability and not torch.cuda.is_available():
        return [
            Finding("processors", "note", f"{said}: bf16 is many times slower than fp32 here", "keep precision fp32")
        ]
    return [Finding("processors", "ok", said)]


def _memory() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit = CGROUP / "memory.max"  # a container's or a job's share, which psutil does not know
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()))
        parts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # files that were read count as used, until somebody needs their memory
        used = int((CGROUP / "memory.current").read_text()) - int(parts["inactive_file"])
        available = min(available, max(total - used, 0))
    return [judge_memory(total, available)]


def _shared_memory() -> list[Finding]:
    return [judge_shared_memory(free_shared_memory())]


def free_shared_memory() -> int | None:
    """Free bytes for batches that loader processes hand over; None without shared memory."""
    folder = Path("/dev/shm")  # noqa: S108 - looked at, not written to
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def _open_files() -> list[Finding]:
    return [judge_open_files(*open_files())]


def _disk() -> list[Finding]:
    here = Path.cwd()
    return [judge_disk(shutil.disk_usage(here).free, folder=str(here), writable=os.access(here, os.W_OK))]


def _locks() -> list[Finding]:
    here = Path.cwd()
    if not os.access(here, os.W_OK):
        return []  # as the check of the disk says
    return [judge_locks(lock_works(here), folder=str(here))]


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi"):
            fix = f"torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}: see what nvidia-smi says"
            return [Finding("gpus", "problem", "nvidia-smi is here, but torch sees no GPU", fix)]
        return [Finding("gpus", "note", "none: the quickstart runs on the CPU; ViT-B and larger want GPUs")]
    findings = []
    for k in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(k)
        bf16 = card.major >= 8  # Ampere and newer compute in it; is_bf16_supported() counts emulation too
        said = f"{card.name}, {card.total_memory / GIB:.0f} GiB, bf16 {'yes' if bf16 else 'no'}"
        fix = "" if bf16 else "--set parallel.precision=fp32"
        findings.append(Finding(f"gpu {k}", "ok" if bf16 else "note", said, fix))
    return findings


def _collectives() -> list[Finding]:
    """NCCL for GPUs, gloo for CPUs and for saving in the background: a group of one shows that gloo comes up here."""
    import torch
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        return [
            Finding("gloo", "problem", "this torch has none: no run of several processes", "install torch from PyPI")
        ]
    findings = []
    try:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        distributed.barrier()
        distributed.destroy_process_group()
        findings.append(Finding("gloo", "ok", "a process group comes up"))
    except RuntimeError as error:
        fix = "set GLOO_SOCKET_IFNAME to the name of a network interface (see: ip link)"
        findings.append(Finding("gloo", "problem", f"no process group: {str(error).splitlines()[0]}", fix))
    if distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))
        findings.append(Finding("nccl", "ok", version))
    elif torch.cuda.is_available():
        findings.append(
            Finding("nccl", "problem", "this torch has none: no run on several GPUs", "install torch from PyPI")
        )
    return findings


def _jpeg() -> list[Finding]:
    """Decode one image for real: a broken libjpeg shows at the first sample otherwise."""
    import numpy as np
    import simplejpeg
    from PIL import features

    pixels = np.full((16, 16, 3), 128, np.uint8)
    decoded = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(pixels, quality=95))
    if decoded.shape != pixels.shape or np.abs(decoded.astype(int) - 128).max() > 3:
        return [
            Finding(
                "jpeg",
                "problem",
                "simplejpeg does not give back what it packed",
                "pip install --force-reinstall simplejpeg",
            )
        ]
    turbo = "libjpeg-turbo" if features.check_feature("libjpeg_turbo") else "libjpeg (not turbo: slower)"
    return [Finding("jpeg", "ok", f"simplejpeg decodes; Pillow has {turbo}")]


def _compiler() -> list[Finding]:
    import torch

    named = os.environ.get("CC", "")  # as triton looks for it
    found = next((path for name in (named, "gcc", "clang") if name and (path := shutil.which(name))), None)
    return [judge_compiler(found, has_gpu=torch.cuda.is_available())]


def _slurm() -> list[Finding]:
    return [judge_slurm([c for c in SLURM_COMMANDS if shutil.which(c)])]


def _shards() -> list[Finding]:
    """The images that ship: what `livt quickstart` needs."""
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.util.errors import LivtError

    try:
        folder = shipped("shards/fashion-mnist-lt")
        sizes = [f"{name} {ShardSet.open(folder / name).num_samples}" for name in ("train-lt", "train-balanced", "val")]
    except LivtError as error:
        return [
            Finding("shipped shards", "problem", error.message, error.remedy or "git checkout shards/fashion-mnist-lt")
        ]
    return [Finding("shipped shards", "ok", f"{', '.join(sizes)} images")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    _python,
    _libraries,
    _processors,
    _memory,
    _shared_memory,
    _open_files,
    _disk,
    _locks,
    _gpus,
    _collectives,
    _jpeg,
    _compiler,
    _slurm,
    _shards,
)
