"""The peak that MFU is measured against: the recipe's word, the table's, or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from livt_scale.config.load import load_recipe
from livt_scale.plan.flops import stage_flops
from livt_scale.train.telemetry import mfu

QUICKSTART = Path(__file__).parents[3] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "name", "sets", "peak"),
    [
        (CPU, "", [], None),
        (CPU, "", ["log.peak_tflops=1.5"], 1.5),
        (GPU, "NVIDIA H200", ["parallel.precision=bf16"], 989.5),
        (GPU, "NVIDIA H200", [], 67),  # fp32 without tensor cores: torch rounds nothing to TF32 unless told
        (GPU, "NVIDIA H200", ["log.peak_tflops=400"], 400),
        (GPU, "Tesla V100-SXM2-32GB", ["parallel.precision=bf16"], None),
        (GPU, "Some GPU", ["parallel.precision=bf16"], None),
    ],
)
def test_a_peak_is_known_or_there_is_none(device, name, sets, peak, monkeypatch):
    monkeypatch.setattr(mfu.torch.cuda, "get_device_name", lambda _device: name)
    assert mfu.peak_tflops(load_recipe(QUICKSTART, sets=sets), device) == peak


def test_speed_counts_what_is_learnt_and_not_what_is_computed_again():
    for sets in ([], ["parallel.activation_checkpointing=true"]):
        recipe = load_recipe(QUICKSTART, sets=sets)
        of = mfu.speed_of(recipe, "finetune", num_classes=10, device=CPU, world_size=2)
        assert of.flops_per_image == stage_flops(load_recipe(QUICKSTART), "finetune", num_classes=10).train


def test_memory_of_this_process_is_told_in_gib():
    assert 0.05 < mfu.memory_peak_gib(CPU) < 24
