"""The benchmarks of order and shuffling run, and tell good shuffles from bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.scripts import load_script

FOLDER = Path(__file__).parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    return load_script(FOLDER / f"{name}.py")


@pytest.mark.slow
def test_the_order_benchmark_writes_cost_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "order.json"
    assert load("order").main(["--quick", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {"start_s", "seek_s", "peak_mib", "step_us_1%", "step_us_99%"} <= set(found["cost"]["instance, iNat18"])
    assert all(1 <= row["mean"] <= row["worst"] <= 1.12 for row in found["bytes"].values())
    assert "class_balanced, iNat18" in capsys.readouterr().out


def test_the_shuffle_benchmark_compares_with_what_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "shuffle.json"
    assert load("shuffle").main(["--quick", "--streaming", str(tmp_path), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["notes"] == [note for note in found["notes"] if "mosaicml-streaming is not here" in note] != []
    rows = found["shuffle"]
    assert rows["ours"]["bytes"] <= 1.1 < rows["independent"]["bytes"]
    assert rows["ours"]["chi2_sorted"] < 1.2 < rows["webdataset, buffer 1000"]["chi2_sorted"]
    assert rows["ours"]["twice"] == 0


def test_figures_tell_a_bad_shuffle() -> None:
    benchmark = load("shuffle")
    shards, labels = np.full(20, 50), np.repeat(np.arange(10), 100)
    unshuffled = benchmark.measure(lambda epoch: np.arange(1000).reshape(-1, 40), labels, shards)
    independent = benchmark.measure(
        lambda epoch: np.random.default_rng(epoch).permutation(1000).reshape(-1, 40), labels, shards
    )
    assert unshuffled["distance"] == 0
    assert independent["distance"] == pytest.approx(1 / 3, abs=0.03)
    assert unshuffled["retention"] == pytest.approx(1000 / 39)
    assert independent["retention"] == pytest.approx(1, abs=0.3)
    assert unshuffled["chi2_sorted"] > 20 > 1.3 > independent["chi2_sorted"]
    assert unshuffled["twice"] == unshuffled["never"] == 0
