"""The loader's benchmark reads photographs with every pipeline that is installed and writes what scripts rely on."""

import json
from pathlib import Path

import pytest

from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loader.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset
@pytest.mark.slow
def test_the_benchmark_measures_all_pipelines_and_writes_its_conditions(benchmark, tmp_path, capsys):
    file = tmp_path / "loader.json"
    assert benchmark.main(["--quick", "--images", "64", "--workers", "0", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    for stage in ("pretrain", "finetune"):
        assert set(result[stage]["images_per_s"]) >= {"ours", "usual", "image_folder", "decode_only", "ours_prepared"}
    assert result["images_per_s"] == result["pretrain"]["images_per_s"]
    for peer in result["not_installed"]:  # a row that says so, never a failure
        assert peer not in result["images_per_s"]
    assert all(rate > 0 for rate in result["images_per_s"].values())
    assert result["ratio"] == pytest.approx(result["images_per_s"]["ours"] / result["images_per_s"]["usual"], rel=0.01)
    assert result["conditions"]["workers"] == 0
    assert 20_000 < result["conditions"]["jpeg_bytes_mean"] < 80_000
    table = capsys.readouterr().out
    assert "usual" in table
    assert ("not installed" in table) == bool(result["not_installed"])
