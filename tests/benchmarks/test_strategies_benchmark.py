"""The strategies' benchmark runs, says what failed, and shows that sharded states shrink with the world size."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from tests.scripts import load_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(BENCHMARKS / "strategies.py")


def few_steps(**fields) -> argparse.Namespace:
    given = {"size": "vit_ti", "batch": 1, "steps": 1, "rounds": 1, "precision": "fp32", "recompute": False, **fields}
    return argparse.Namespace(**given)


@pytest.mark.slow
def test_two_ranks_of_fsdp_hold_half_of_what_ddp_holds(benchmark) -> None:
    results = benchmark.run(few_steps(worlds=[2], strategies=["ddp", "fsdp"]))["2"]
    assert results["fsdp"]["held_bytes"] == pytest.approx(results["ddp"]["held_bytes"] / 2, rel=0.01)
    assert results["fsdp"]["loss"] == pytest.approx(results["ddp"]["loss"], rel=1e-4)
    for figures in results.values():
        assert figures["tokens_per_s"] == pytest.approx(2 * (49 + 1 + 197) / figures["step_s"])
    assert "fsdp" in benchmark.table({"2": results})


def test_what_cannot_run_is_told_and_stops_nothing_else(benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    broken = [benchmark.sys.executable, "-c", "import sys; raise SystemError('out of memory')"]
    monkeypatch.setattr(benchmark.subprocess, "Popen", lambda words, **named: POPEN(broken, **named))
    results = benchmark.run(few_steps(worlds=[1], strategies=["zero1", "ddp"], rounds=3))["1"]
    assert results["zero1"]["failed"] == "deepspeed is not installed"
    assert "out of memory" in results["ddp"]["failed"]
    assert "out of memory" in benchmark.table({"1": results})


POPEN = subprocess.Popen


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "zero3"])
def test_held_memory_falls_as_one_over_the_world_size(benchmark, strategy: str) -> None:
    held = {n: benchmark.measure(few_steps(), strategy, n)["held_bytes"] for n in (1, 2, 4)}
    print(f"\n{strategy}: " + ", ".join(f"{n} ranks {size / 1e6:.1f} MB" for n, size in held.items()))
    for n in (2, 4):
        assert held[n] == pytest.approx(held[1] / n, rel=0.1)
