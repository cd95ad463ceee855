"""The parts of benchmarks/gpu.py that run `livt train`: is it right on a GPU, where does the host wait, how fast is it?

right     both stages of a small model on the GPU and on the CPU, in fp32 and in bf16: losses and waits
train     pretraining of ViT-L on JPEG shards that are made here: the means of its metrics.jsonl
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parents[1]
METRICS = "metrics.jsonl"
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # largest relative difference of a loss from the CPU's


class Results(Protocol):
    """`gpu.Results`."""

    out: Path

    def add(self, part: str, name: str, **values: Any) -> None: ...
    def failures(self, part: str, name: str) -> AbstractContextManager[None]: ...


def right(results: Results, *, quick: bool) -> None:
    """All runs at the same time: they are small, and most of their time is imports."""
    with tempfile.TemporaryDirectory(prefix="livt-gpu-") as name:
        folder = Path(name)
        precisions = ["fp32"] if quick else list(TOLERANCE)
        runs = {(kind, precision): start_small(folder, kind, precision, quick=quick)
                for precision in precisions for kind in ("cpu", "device")}  # fmt: skip
        codes = {run: process.wait() for run, process in runs.items()}
        for precision in precisions:
            with results.failures("right", precision):
                places = [folder / f"{kind}-{precision}" for kind in ("cpu", "device")]
                if bad := [str(run) for run in runs if run[1] == precision and codes[run]]:
                    raise RuntimeError(f"livt train failed: {', '.join(bad)}: see log.txt")
                allowed = TOLERANCE[precision]
                difference = largest_difference(*(losses_of(place) for place in places))
                results.add("right", precision, **difference, allowed=allowed, agrees=difference["largest"] <= allowed)
                results.add("waits", precision, **json.loads((folder / f"device-{precision}.json").read_text()))


def start_small(folder: Path, kind: str, precision: str, *, quick: bool) -> subprocess.Popen[bytes]:
    """`livt train` of both stages on the images that ship, its GPUs hidden for "cpu"; waits in KIND-PRECISION.json."""
    shards = ROOT / "shards" / "fashion-mnist-lt"
    sets: dict[str, Any] = {
        "run_dir": folder / f"{kind}-{precision}",
        "data.train": shards / "train-lt", "data.val": shards / "val", "data.workers": 0,
        "model.width": 48, "model.depth": 2,
        "model.decoder.width": 32, "model.decoder.depth": 1, "model.decoder.heads": 2,
        "stages.*.epochs": 1, "stages.*.warmup_epochs": 0, "stages.*.base_lr": 1e-3,
        "stages.*.global_batch": 512 if quick else 128, "stages.*.micro_batch": 512 if quick else 128,
        "parallel.precision": precision, "parallel.threads": 1,
        "checkpoint.every_steps": 10**6, "log.every_steps": 2, "log.tensorboard": False,
    }  # fmt: skip
    report = str(folder / f"{kind}-{precision}.json")
    words = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu.py"),
        "livt",
        report,
        *train_words("fashion_mnist_lt/quickstart.yaml", sets),
    ]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {}
    return subprocess.Popen(words, env={**os.environ, **hidden}, cwd=ROOT)


def train_words(recipe: str, sets: dict[str, Any]) -> list[str]:
    return ["train", str(ROOT / "recipes" / recipe), "--no-report", *(f"--set={k}={v}" for k, v in sets.items())]


def losses_of(run_dir: Path) -> list[float]:
    """The means of each log interval, both stages."""
    lines = [line for stage in ("pretrain", "finetune") for line in metrics_of(run_dir / stage)]
    return [line["loss"] for line in lines]


def metrics_of(stage_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage_dir / METRICS).read_text().splitlines()]


def largest_difference(expected: list[float], found: list[float]) -> dict[str, Any]:
    differences = [abs(b / a - 1) for a, b in zip(expected, found, strict=True)]
    return {"compared": len(differences), "largest": max(differences)}


def livt_counting_waits(report: Path, words: list[str]) -> None:
    """Run `livt WORDS` and write where the host waited for the GPU: torch warns of each wait.

    An ordinary step neither logs, nor saves, nor evaluates, and is not a stage's first.
    """
    from livt_scale.cli.main import main
    from livt_scale.train.loop import Loop

    counts = {"ordinary": Counter[str](), "other": Counter[str]()}
    kind, num_ordinary = "other", 0
    step_once = Loop._train_step

    def train_step(loop: Loop, batches: Any) -> None:
        nonlocal kind, num_ordinary
        number, schedule = loop.state.step + 1, loop.schedule
        is_due = any(due(number) for due in (schedule.logs, schedule.saves, schedule.evaluates))
        kind = "other" if is_due or number == 1 else "ordinary"
        num_ordinary += kind == "ordinary"
        step_once(loop, batches)
        kind = "other"

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            counts[kind][_place()] += 1

    Loop._train_step = train_step  # type: ignore[method-assign]
    warnings.showwarning = note
    warnings.simplefilter("always")
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
    sys.argv = ["livt", *words]
    try:
        main()
    finally:
        found = {"ordinary_steps": num_ordinary, "in_ordinary_steps": counts["ordinary"].total()}
        report.write_text(json.dumps({**found, **counts}))


def _place() -> str:
    """The innermost line of the package, as `train/loop.py:200`."""
    ours = [f for f in traceback.extract_stack() if "/livt_scale/" in f.filename]
    return f"{ours[-1].filename.rpartition('/livt_scale/')[2]}:{ours[-1].lineno}" if ours else "elsewhere"


def train(results: Results, *, quick: bool) -> None:
    """Pretraining by `livt train` on photographs' cuts as JPEGs of 500x375 px; the first line, which compiles, is left
    out."""
    from loader import make_shards

    steps, batch, log_every = (8, 8, 2) if quick else (60, 256, 10)
    num_images = steps * batch // (1 if quick else 6)  # 6 epochs
    with tempfile.TemporaryDirectory(prefix="livt-gpu-") as name, results.failures("train", "livt train"):
        folder = Path(name)
        began = time.monotonic()
        shards = make_shards(folder, num_images=num_images).folder
        made_s = round(time.monotonic() - began, 1)
        sets: dict[str, Any] = {
            "run_dir": folder / "run", "data.train": shards, "data.val": shards,
            "data.workers": 1 if quick else min(12, len(os.sched_getaffinity(0))),
            "stages.pretrain.epochs": 1 if quick else 6, "stages.pretrain.warmup_epochs": 0,
            "stages.pretrain.global_batch": batch, "stages.pretrain.micro_batch": batch,
            "checkpoint.every_steps": steps // 2, "checkpoint.mode": "async",
            "log.every_steps": log_every, "log.tensorboard": False,
        }  # fmt: skip
        if quick:
            sets |= {"model.size": "vit_ti", "model.depth": 1, "model.image_px": 64, "model.decoder.depth": 1}
            sets |= {"parallel.compile": "false", "parallel.precision": "fp32"}
        words = [*train_words("imagenet_lt/vit_l16.yaml", sets), "--stage", "pretrain"]
        try:
            subprocess.run([sys.executable, "-m", "livt_scale", *words], cwd=ROOT, check=True)
        finally:
            if (folder / "run" / "pretrain" / METRICS).exists():
                shutil.copy(folder / "run" / "pretrain" / METRICS, results.out / METRICS)
        lines = metrics_of(folder / "run" / "pretrain")
        results.add("train", "livt train", batch=batch, steps=steps, made_shards_s=made_s, **means_of(lines[1:]))


def means_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the fields of metrics.jsonl that say where a step's time went."""
    names = ("step_s", "images_per_s", "data_wait_s", "checkpoint_stall_s", "other_s", "tflops", "mfu")
    found = {name: [line[name] for line in lines if line.get(name) is not None] for name in names}
    return {name: round(statistics.mean(values), 6) if values else None for name, values in found.items()}
