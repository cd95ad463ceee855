"""The planner's formula against --exact: what is shared, kept, compared and told; one setting measured for real."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from livt_scale.plan.exact import Measurement
from livt_scale.plan.memory import plan_memory
from livt_scale.plan.parameters import weights_of
from tests.scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_exact.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script(SCRIPT)


def as_planned(setting, *, times=1.0):
    """A measurement that says what the formula says, its peak so many times as high."""
    recipe = setting.recipe()
    memory = plan_memory(
        recipe, setting.stage, weights_of(recipe.model, setting.stage, num_classes=1000), setting.spread
    )
    peak = round(times * memory.peak)
    return Measurement("fsdp", memory.weights, memory.grads, memory.optimizer, memory.activations, peak, 2**29)


def test_ddp_and_the_zeros_share_a_measurement_and_fsdp_has_one_for_each_world(benchmark):
    one = benchmark.Setting("ViT-B", "pretrain", "ddp", False, 8, 32)
    shared = [replace(one, strategy=name, ranks=ranks) for name in ("ddp", "zero1", "zero3") for ranks in (8, 64)]
    apart = [one, replace(one, strategy="fsdp"), replace(one, strategy="fsdp", ranks=64), replace(one, recompute=True)]
    assert len({s.measured_as for s in shared}) == 1
    assert len({s.measured_as for s in apart}) == 4


def test_it_goes_on_from_its_file_and_ends_badly_where_a_peak_is_out(benchmark, tmp_path, monkeypatch, capsys):
    taken = []

    def measure(recipe, stage, spread, **_):
        setting = benchmark.Setting("ViT-B", stage, spread.strategy, spread.recompute, spread.gpus, spread.micro_batch)
        taken.append(setting.measured_as)
        return as_planned(setting, times=1.3 if spread.recompute else 1.1)

    monkeypatch.setattr(benchmark, "measure_computing", measure)
    words = ["plan_exact", "--models", "ViT-B", "--strategies", "fsdp", "--ranks", "8", "--json", str(tmp_path / "m")]
    monkeypatch.setattr(sys, "argv", words)
    assert benchmark.main() == 1
    first = capsys.readouterr().out
    assert "-9.1 % |" in first  # 1 / 1.1
    assert "-23.1 % OUT |" in first  # 1 / 1.3
    assert "2 settings, 1 out of the bounds" in first
    assert len(taken) == len(json.loads((tmp_path / "m").read_text())) == 2
    assert benchmark.main() == 1
    assert (len(taken), capsys.readouterr().out) == (2, first)  # nothing measured twice


def test_states_are_compared_where_they_are_measured(benchmark):
    setting = benchmark.Setting("ViT-B", "pretrain", "ddp", False, 8, 32)
    right = as_planned(setting)
    assert benchmark.compare(setting, right).within
    assert not benchmark.compare(setting, replace(right, optimizer=right.optimizer // 2)).within


@pytest.mark.slow
def test_a_measurement_is_within_the_bounds(benchmark):
    """One for each way to measure; the whole matrix is the script's."""
    for strategy in ("fsdp", "ddp", "zero2"):
        setting = benchmark.Setting("ViT-B", "finetune", strategy, True, 8, 4)
        found = benchmark.measured(setting, {}, None)
        compared = benchmark.compare(setting, found)
        assert compared.within, (strategy, asdict(found), compared.peak_off)
        assert found.resident_bytes < 4 * 2**30
