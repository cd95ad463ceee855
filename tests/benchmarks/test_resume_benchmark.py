"""The benchmark of resuming starts each loader at both steps and writes what scripts rely on."""

import json
from pathlib import Path

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume.py"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
def test_the_benchmark_starts_at_step_10_and_at_the_last(tmp_path, capsys):
    benchmark = load_script(SCRIPT)
    file = tmp_path / "resume.json"
    assert benchmark.main(["--quick", "--workers", "0", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["first_batch_s"]) >= {"ours", "webdataset"}
    assert result["steps"] == [10, 2423 // 64 - 1] or result["steps"][1] > 10
    for one in result["first_batch_s"].values():
        assert one["ratio"] == pytest.approx(one["last"] / one["first"], rel=0.1)
    assert "ours" in capsys.readouterr().out
