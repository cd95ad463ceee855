"""What Bal-BCE is timed against computes what it is said to compute."""

import json
from pathlib import Path

import pytest
import torch

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loss.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def test_ours_and_the_published_form_agree_and_plain_is_another_loss(benchmark):
    logits, targets = benchmark.draw(8, 50, torch.device("cpu"))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))
    losses = benchmark.contenders(50)
    found = benchmark.measure_time(losses, logits, targets, rounds=2)
    assert found["largest_relative_difference"] < benchmark.TOLERANCE
    assert found["seconds"].keys() == losses.keys()
    losses["ours"] = losses["plain"]
    assert benchmark.measure_time(losses, logits, targets, rounds=1)["largest_relative_difference"] > 1e-2


def test_ours_holds_the_gradient_and_little_more_and_the_published_form_three_of_its_size(benchmark):
    logits, targets = benchmark.draw(1024, 2000, torch.device("cpu"))
    found = benchmark.measure_memory(benchmark.contenders(2000), logits, targets)
    size = found["bytes_of_the_logits"]
    assert size == 1024 * 2000 * 4
    assert size < found["peak_bytes"]["ours"] < 1.6 * size  # with groups of a megabyte
    assert 3 * size <= found["peak_bytes"]["published"]
    assert found["memory_ratio"] == found["peak_bytes"]["ours"] / found["peak_bytes"]["plain"]


def test_it_runs_and_writes_its_figures(benchmark, tmp_path, capsys):
    file = tmp_path / "loss.json"
    assert benchmark.main(["--quick", "--rounds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert min(found["time_ratio"], found["memory_ratio"]) > 0
    assert found["value_off_float64"]["ours"] < 1e-6
    assert "of plain's time" in capsys.readouterr().out
