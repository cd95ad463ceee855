"""What benchmarks/gpu.sh does without a GPU: its time limits, its table, and the list of what it brings along."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from livt_scale.cli import main
from livt_scale.train import loop
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# A Python that has all packages, ends the first part well, fails in the second and hangs in the third.
FAKE = """#!/bin/sh
case "$2" in
  ceilings) echo '{"part": "ceilings", "name": "machine"}' >> "$4/gpu.jsonl" ;;
  right) exit 3 ;;
  mfu) echo '{"part": "mfu", "name": "ViT-L compiled"}' >> "$4/gpu.jsonl"; sleep 60 ;;
esac
"""
LINES = [
    {"part": "ceilings", "name": "machine", "device_type": "cuda", "device": "NVIDIA H200", "peak_tflops": 989.5,
     "versions": {"torch": "2.11.0", "deepspeed": None}, "date": "2026-12-01", "commit": "abc", "cores": 16},
    {"part": "ceilings", "name": "product", "side": 8192, "tflops": 790.0},
    {"part": "mfu", "name": "ViT-L compiled", "batch": 512, "step_s": 0.16, "images_per_s": 3223.0, "tflops": 395.8},
    {"part": "mfu", "name": "ViT-H compiled", "failed": "OutOfMemoryError: CUDA out of memory"},
]  # fmt: skip
PAGE = "# A page\n\n<!-- results: begin -->\n\nNot yet run on a GPU.\n\n<!-- results: end -->\n\nmore\n"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield load_script(BENCHMARKS / "gpu.py")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_a_part_that_fails_or_hangs_keeps_its_results_and_the_deadline_holds(tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE)
    python.chmod(0o755)
    environ = {**os.environ, "PYTHON": str(python), "DEADLINE_S": "7", "QUICK": ""}
    done = subprocess.run([BENCHMARKS / "gpu.sh", out], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert [(x["part"], x["name"]) for x in lines if "failed" not in x] == [
        ("ceilings", "machine"), ("mfu", "ViT-L compiled"),
    ]  # fmt: skip
    assert [x["part"] for x in lines if "failed" in x] == ["right", "mfu", "train", "zero"]
    assert len(list(out.iterdir())) <= 4


def table(tmp_path, lines, page=None):
    results = tmp_path / "gpu.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [sys.executable, BENCHMARKS / "gpu_table.py", results, *(["--page", page] if page else [])]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_each_part_runs_in_miniature_on_a_cpu(tmp_path):
    out = tmp_path / "an out folder"
    environ = {**os.environ, "QUICK": "1", "PYTHON": sys.executable}
    done = subprocess.run([BENCHMARKS / "gpu.sh", out], env=environ, capture_output=True, text=True, timeout=1100)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"imports", "ceilings", "right", "waits", "mfu", "train", "zero"}
    assert not [line for line in lines if "failed" in line]
    assert next(line["agrees"] for line in lines if line["part"] == "right")
    assert "ViT-L compiled" in (out / "table.md").read_text()


def test_the_table_fills_the_page_and_invents_nothing(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(PAGE)
    assert table(tmp_path, LINES, page).returncode == 0
    text = page.read_text()
    assert "not yet run" not in text.lower()
    assert "40.0%" in text  # 395.8 of 989.5
    assert "50.1%" in text  # of 790
    assert "out of memory" in text
    assert "livt train" not in text  # which did not run
    assert text.endswith("<!-- results: end -->\n\nmore\n")


def test_results_of_a_cpu_do_not_go_into_the_page(tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text(PAGE)
    assert table(tmp_path, [{**LINES[0], "device_type": "cpu"}, *LINES[1:]], page).returncode == 1
    assert page.read_text() == PAGE


def test_the_page_has_the_places_for_the_table():
    page = (ROOT / "docs/gpu.md").read_text()
    assert re.search("<!-- results: begin -->.*<!-- results: end -->", page, re.DOTALL)


def test_what_the_package_needs_is_in_the_bundle_or_on_the_machine():
    bundle = load_script(ROOT / "scripts/gpu_bundle.py")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = [line for line in (BENCHMARKS / "bare.txt").read_text().splitlines() if not line.startswith("#")]
    there = {"torch", "torchvision", "timm", "accelerate", *listed, *bundle.READY_MADE, *bundle.BUILT}
    assert {canonicalize_name(Requirement(line).name) for line in needed} <= set(map(canonicalize_name, there))


def test_a_batch_that_does_not_fit_is_halved(gpu, monkeypatch):
    tried = []

    def step_of(model, batch, parallel):
        tried.append(batch)
        if batch > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: None

    monkeypatch.setattr(gpu, "training_step", step_of)
    assert gpu.measured_step(gpu.TINY, 512, gpu.Parallel(), quick=True)["batch"] == 128
    assert tried == [512, 256, 128]


def test_a_step_of_the_model_is_timed(gpu):
    found = gpu.measured_step(gpu.TINY, 2, gpu.Parallel(strategy="ddp"), quick=True)
    assert found["batch"] == 2
    assert found["images_per_s"] == pytest.approx(2 / found["step_s"], rel=0.05)


class LoopThatWaits:
    """Each step waits for the GPU once; of four steps the third logs."""

    def __init__(self, step: int) -> None:
        self.state = SimpleNamespace(step=step)
        never = dict.fromkeys(("saves", "evaluates"), lambda number: False)
        self.schedule = SimpleNamespace(**never, logs=lambda number: number == 3)

    def run(self) -> None:
        self._train_step(None)

    def _train_step(self, batches: None) -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)


def test_waits_are_counted_apart_in_ordinary_steps(gpu, monkeypatch, tmp_path):
    """Neither the stage's first step is one, nor one that logs."""
    monkeypatch.setattr(loop, "Loop", LoopThatWaits)
    monkeypatch.setattr(main, "main", lambda: [LoopThatWaits(done).run() for done in range(4)])
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        gpu.gpu_train.livt_counting_waits(tmp_path / "waits.json", ["train"])
    found = json.loads((tmp_path / "waits.json").read_text())
    assert (found["ordinary_steps"], found["in_ordinary_steps"]) == (2, 2)
    assert sum(found["other"].values()) == 2
