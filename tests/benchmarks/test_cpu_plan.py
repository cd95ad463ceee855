"""The planner's benchmark on a CPU runs, and plans what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "cpu_plan.py"


@pytest.mark.slow
def test_a_step_of_both_stages_is_planned_and_measured(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "cpu.json")]
    subprocess.run(words, check=True, timeout=280, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert [(row["size"], row["stage"]) for row in rows] == [("vit_ti", "pretrain"), ("vit_ti", "finetune")]
    for row in rows:
        assert 0.3 < row["planned_s"] / row["measured_s"] < 3  # of one step, perhaps on a busy machine
