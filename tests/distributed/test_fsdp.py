"""`strategy: fsdp` in one process that no launcher started: the same numbers as `ddp`, and a run that resumes."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.whole_runs import Livt, assert_same_run, final_weights, metrics

ONE_STAGE = {"stages.*.epochs": 1, "checkpoint.keep_last": 9, "checkpoint.mode": "sync"}  # 9 steps


def test_one_process_without_a_launcher_learns_what_ddp_does_and_resumes(tmp_path):
    livt = Livt(tmp_path)
    runs = {name: tmp_path / name for name in ("ddp", "fsdp", "resumed")}
    for name in ("ddp", "fsdp"):
        livt.train(runs[name], stage="pretrain", parallel__strategy=name, **ONE_STAGE)

    ours, theirs = (metrics(runs[name], "pretrain") for name in ("fsdp", "ddp"))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    ours, theirs = (final_weights(runs[name], "pretrain") for name in ("fsdp", "ddp"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)

    shutil.copytree(runs["fsdp"], runs["resumed"])
    (runs["resumed"] / "pretrain" / "status.json").unlink()
    shutil.rmtree(runs["resumed"] / "pretrain" / "checkpoints" / "step-00000009")
    said = livt.train(runs["resumed"], stage="pretrain", parallel__strategy="fsdp", **ONE_STAGE)
    assert "resumed from step-00000006" in said
    assert_same_run(runs["resumed"], runs["fsdp"], stages=["pretrain"])
