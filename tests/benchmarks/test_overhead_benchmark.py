"""The overhead benchmark counts what the loop does beside its steps, and only that."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overhead.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script(SCRIPT)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_it_runs_both_stages_and_writes_the_overhead(benchmark: ModuleType, tmp_path: Path, stage: str) -> None:
    file = tmp_path / "overhead.json"
    options = ["--quick", "--batch", "2", "--intervals", "1", "--stage", stage, "--json", str(file)]
    assert benchmark.main([*options, "--checkpoints"] if stage == "pretrain" else options) == 0
    found = json.loads(file.read_text())
    assert found["overhead"] == pytest.approx(found["step_s"]["loop"] / found["step_s"]["bare"] - 1)
    assert found["loop_cpu_s"] == pytest.approx(found["cpu_s"]["loop"] - found["cpu_s"]["bare"])
    assert found["quick"] is True


def test_steps_alternate_and_a_save_is_paid_by_the_loop(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def passes(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    turns = benchmark.TakenInTurn(
        ["batch"], bare_step=lambda _: passes("bare", 1.0), settle=lambda: passes("settle", 0.5)
    )
    for _ in range(3):
        assert next(turns) == "batch"
        passes("loop", 2.0)
    assert calls == ["settle", "bare", "loop"] * 3
    assert turns.bare_s == [1.0, 1.0, 1.0]
    assert turns.loop_s == [2.5, 2.5]
