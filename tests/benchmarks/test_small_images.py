"""The benchmark of small images measures both ways and writes them."""

import json
from pathlib import Path

import pytest

from tests.scripts import load_script


def test_both_ways_are_measured_and_written(tmp_path, capsys):
    benchmark = load_script(Path(__file__).parents[2] / "benchmarks" / "small_images.py")
    assert benchmark.main(["--quick", "--json", str(tmp_path / "small.json")]) == 0
    result = json.loads((tmp_path / "small.json").read_text())
    assert result["one"] > 0
    assert result["together"] > 0
    printed = capsys.readouterr().out
    ratio = float(printed.split("images/s, ")[1].split(" times")[0])
    assert ratio == pytest.approx(result["together"] / result["one"], abs=0.01)
