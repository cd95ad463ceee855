"""The checkpoint benchmark measures what it says, on a small model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint.py"


@pytest.mark.slow
def test_it_measures_both_modes_alone_and_by_two_ranks_and_cleans_up(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--quick", "--dir", str(tmp_path), "--json", str(tmp_path / "it.json")]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "it.json").read_text())
    assert report["stall_s"].keys() == {"sync", "async"}
    assert 0 < report["stall_s"]["async"] < report["stall_s"]["sync"]
    assert report["layouts"].keys() == {"one process", "ddp", "fsdp"}
    for layout in report["layouts"].values():
        assert abs(layout["bytes"] / report["bytes"] - 1) < 0.05  # the same state, however it is spread
        assert min(layout["bytes_by_rank"]) > 0.8 * max(layout["bytes_by_rank"])
        for figure in (layout["save_gb_per_s"]["async"], layout["load_gb_per_s"], layout["resume_s"]):
            assert figure > 0
    assert "written by rank" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]
