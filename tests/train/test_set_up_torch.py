"""What a run sets in torch before it trains."""

from __future__ import annotations

import pytest
import torch

from livt_scale.config.recipe import Parallel
from livt_scale.train.run import _set_up_torch


@pytest.mark.parametrize(
    ("device", "precision", "set_to"),
    [("cuda", "bf16", ["high"]), ("cuda", "fp16", ["high"]), ("cuda", "fp32", []), ("cpu", "bf16", [])],
)
def test_only_low_precision_on_a_gpu_has_tf32(monkeypatch, device, precision, set_to):
    calls = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    _set_up_torch(Parallel(precision=precision), torch.device(device))
    assert calls == set_to
