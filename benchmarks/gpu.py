"""The parts of `benchmarks/gpu.sh`: what one GPU is measured for. Each result is a line of gpu.jsonl, appended at once.

    python benchmarks/gpu.py ceilings --out OUT          # one part, into OUT/gpu.jsonl
    python benchmarks/gpu.py mfu --out OUT --quick       # in miniature, also on a CPU: does it run?

    imports   of every benchmark: is anything missing on this machine?
    ceilings  versions; a large bf16 product; a copy within the device's memory
    right     `livt train` of both stages on the GPU and on the CPU: the losses agree; where the host waits for the GPU
    mfu       steps of the masked autoencoder, model and inputs made on the device, timed by CUDA events
    train     `livt train` on JPEG shards that are made here: its own figures, from metrics.jsonl
    zero      the same steps under DeepSpeed's ZeRO 1 and 3

Without a GPU everything runs on the CPU, and events are replaced by `time.perf_counter`.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_train
import torch

from livt_scale.config.model import Decoder
from livt_scale.config.recipe import Model, Parallel
from livt_scale.distributed import blocks
from livt_scale.distributed.ports import free_port
from livt_scale.distributed.strategy import Strategy
from livt_scale.distributed.world import detect, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.mae import build_mae
from livt_scale.optim import param_groups
from livt_scale.plan.devices import named
from livt_scale.plan.flops import mae_flops

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "gpu.jsonl"
MASK_RATIO, BETAS, LR = 0.75, (0.9, 0.95), 1e-4
WARM_UP, STEPS = 5, 20
HALVINGS = 3  # of a batch that does not fit in the memory
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pydantic", "simplejpeg", "webdataset")

TINY = Model(size="vit_micro", image_px=28, depth=1, decoder=Decoder(width=32, depth=1, heads=2))

# name, size, images per step, fields of the recipe's part `parallel`; the most wanted first
MFU_RUNS: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("ViT-L compiled", "vit_l", 512, {"compile": True}),
    ("ViT-L eager", "vit_l", 512, {}),
    ("ViT-L compiled, fsdp", "vit_l", 512, {"compile": True, "strategy": "fsdp"}),
    ("ViT-B compiled", "vit_b", 1024, {"compile": True}),
    ("ViT-H compiled", "vit_h", 256, {"compile": True}),
    ("ViT-L compiled, recomputed", "vit_l", 512, {"compile": True, "activation_checkpointing": True}),
)


class Results:
    """Appends lines to `out`/gpu.jsonl."""

    def __init__(self, out: Path) -> None:
        self.out, self._began = out, time.monotonic()

    def add(self, part: str, name: str, **values: Any) -> None:
        line = {"part": part, "name": name, **values, "at_s": round(time.monotonic() - self._began, 1)}
        with (self.out / RESULTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    @contextmanager
    def failures(self, part: str, name: str) -> Iterator[None]:
        """An exception is a result too, and stops nothing else."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(part, name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def seconds_of(work: Callable[[], Any], *, warm_up: int, repeats: int) -> list[float]:
    """Of each of `repeats` calls, by CUDA events on a GPU: the device's seconds, and no wait between the calls."""
    for _ in range(warm_up):
        work()
    if device().type == "cpu":
        moments = [time.perf_counter()]
        for _ in range(repeats):
            work()
            moments.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


# --- ceilings ---


def ceilings(results: Results, *, quick: bool) -> None:
    results.add("ceilings", "machine", **machine())
    gpu = device()
    side = 256 if quick else 8192
    with results.failures("ceilings", "product"):
        a, b = (torch.randn(side, side, device=gpu, dtype=torch.bfloat16) for _ in range(2))
        taken = statistics.median(seconds_of(lambda: a @ b, warm_up=3, repeats=10))
        results.add("ceilings", "product", side=side, tflops=round(2 * side**3 / taken / 1e12, 3))
    with results.failures("ceilings", "copy"):
        source = torch.zeros(4 * 10**6 if quick else 4 * 10**9, device=gpu, dtype=torch.uint8)
        target = torch.empty_like(source)
        taken = statistics.median(seconds_of(lambda: target.copy_(source), warm_up=2, repeats=10))
        rate = round(2 * source.numel() / taken / 1e9, 1)  # read and written
        results.add("ceilings", "copy", bytes=source.numel(), gb_per_s=rate)


def machine() -> dict[str, Any]:
    """What was measured on."""
    found: dict[str, Any] = {
        "device_type": device().type,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "commit": _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "driver": _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
    }
    if device().type == "cuda":
        card = torch.cuda.get_device_properties(0)
        known = named(card.name)
        found |= {"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1)}
        found |= {"gpus": torch.cuda.device_count(), "peak_tflops": known.bf16 if known else None}
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "cudnn": torch.backends.cudnn.version()}
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: list[str]) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


# --- mfu ---


def mfu(results: Results, *, quick: bool) -> None:
    """In one process; a run whose memory is not enough is repeated with half of the images."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(os.getpid()))}
    with process_group(detect(), timeout_s=300):
        torch.set_float32_matmul_precision("high")  # as `livt train` does
        if quick:
            blocks.BACKEND = "aot_eager"  # no C++ to compile
        for name, size, batch, parallel in MFU_RUNS:
            with results.failures("mfu", name):
                model, images = (TINY, 4) if quick else (Model(size=size), batch)
                precision = "fp32" if quick else "bf16"  # a CPU may take many times as long for bf16
                part = Parallel(**{"strategy": "ddp", "precision": precision, **parallel})
                results.add("mfu", name, **measured_step(model, images, part, quick=quick))


def measured_step(model: Model, batch: int, parallel: Parallel, *, quick: bool) -> dict[str, Any]:
    for _ in range(HALVINGS):
        try:
            return _measured_step(model, batch, parallel, quick=quick)
        except torch.OutOfMemoryError:
            batch //= 2
        _free_memory()  # outside `except`, whose traceback holds the tensors
    return _measured_step(model, batch, parallel, quick=quick)


def _measured_step(model: Model, batch: int, parallel: Parallel, *, quick: bool) -> dict[str, Any]:
    began = time.monotonic()
    _free_memory()
    step = training_step(model, batch, parallel)
    warm_up, repeats = (1, 2) if quick else (WARM_UP, STEPS)
    step()  # compiles
    started = time.monotonic() - began
    seconds = seconds_of(step, warm_up=warm_up, repeats=repeats)
    images_per_s = batch / statistics.median(seconds)
    flops = mae_flops(model, mask_ratio=MASK_RATIO).train
    figures = {
        "batch": batch,
        "steps": repeats,
        "step_s": round(statistics.median(seconds), 6),
        "slowest_step_s": round(max(seconds), 6),
        "images_per_s": round(images_per_s, 1),
        "gflop_per_image": round(flops / 1e9, 1),
        "tflops": round(flops * images_per_s / 1e12, 3),
        "start_s": round(started, 1),
    }
    if device().type == "cuda":
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return figures


def training_step(model: Model, batch: int, parallel: Parallel) -> Callable[[], None]:
    """One step of pretraining as the loop takes it, without a wait of the host on a GPU."""
    gpu = device()
    torch.manual_seed(0)
    with gpu:
        network = build_mae(model, norm_pix=True, mask_ratio=MASK_RATIO)
        images = torch.randn(batch, model.channels, model.image_px, model.image_px)
        noise = torch.rand(batch, model.num_patches)

    def groups(network: torch.nn.Module) -> list[dict[str, Any]]:
        return param_groups(network, lr=LR, weight_decay=0.05, layer_decay=None, tokens_decay=True)

    strategy: Strategy = make_strategy(parallel, network, groups, betas=BETAS, world=detect())

    def step() -> None:
        loss = strategy.call(images, noise, last=True)
        strategy.backward(loss, last=True)
        if gpu.type == "cuda" and strategy.on_device is not None:
            strategy.on_device.update_unless(~loss.detach().isfinite(), LR, max_norm=None)
        else:
            strategy.update(LR, max_norm=None)

    return step


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- zero ---


def zero(results: Results, *, quick: bool) -> None:
    import strategies

    size, batch, steps = ("vit_ti", 1, 1) if quick else ("vit_l", 256, 10)
    fields = {"size": size, "batch": batch, "steps": steps, "precision": "fp32" if quick else "bf16"}
    fields["recompute"] = False
    flops = mae_flops(Model(size=size), mask_ratio=MASK_RATIO).train
    for name in ("zero1", "zero3"):
        found = strategies.measure(argparse.Namespace(**fields), name, 1)
        if "step_s" in found:
            images_per_s = batch / found["step_s"]
            found |= {"images_per_s": round(images_per_s, 1), "tflops": round(flops * images_per_s / 1e12, 3)}
        results.add("zero", name, batch=batch, steps=steps, **found)


def imports(results: Results, *, quick: bool) -> None:  # noqa: ARG001
    """Of every benchmark: what is missing on this machine fails here."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        with results.failures("imports", path.name):
            importlib.import_module(path.stem)
            results.add("imports", path.name)


PARTS: dict[str, Callable[..., None]] = {
    "imports": imports,
    "ceilings": ceilings,
    "right": gpu_train.right,
    "mfu": mfu,
    "train": gpu_train.train,
    "zero": zero,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in PARTS:
        part = commands.add_parser(name)
        part.add_argument("--out", type=Path, required=True, metavar="FOLDER")
        part.add_argument("--quick", action="store_true", help="in miniature: figures without meaning")
    counted = commands.add_parser("livt", help="run livt and write where the host waits for the GPU")
    counted.add_argument("report", type=Path)
    counted.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.command == "livt":
        gpu_train.livt_counting_waits(args.report, args.words)
    else:
        PARTS[args.command](Results(args.out), quick=args.quick)


if __name__ == "__main__":
    main()
