"""Runs that step over bad batches: killed and continued, they step over the same ones and end with the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from livt_scale.checkpoint.load import list_checkpoints, read_tensors
from livt_scale.train.run_files import read_status
from tests.chaos.ranks import Ranks, assert_same_pretraining

ONE = {"world": 1, "checkpoint__keep_last": 9}
POLICIES = {"faults__on_non_finite": "rollback", "faults__on_spike": "skip", "faults__spike_window": 10}


def run(livt, run_dir, *faults, expect=0, **sets) -> str:
    with Ranks(livt, run_dir, *faults, **sets) as ranks:
        codes, _ = ranks.ended(within_s=120)
        assert set(codes) == {expect}, ranks.said(0)
        return ranks.said(0)


def saved(run_dir, step: int):
    path = run_dir / "pretrain" / "checkpoints" / f"step-{step:08d}"
    facts = next(c for c in list_checkpoints(path.parent) if c.path == path).manifest.facts
    return read_tensors(path), facts["anomalies"]


@pytest.mark.slow
def test_a_rollback_takes_the_weights_of_the_last_checkpoint_and_the_position_goes_on(livt):
    run_dir, every = livt.folder / "run", {**ONE, **POLICIES}
    said = run(livt, run_dir, "nan:8", "spike:17", **every)
    assert "step 8: the loss is nan: rollback, weights as after step 6, no update for steps 7 to 8" in said
    assert "deviations above" in said
    before, _ = saved(run_dir, 6)
    after, facts = saved(run_dir, 8)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert facts["not_taken"] == [[7, 8]]
    assert saved(run_dir, 18)[1]["not_taken"] == [[7, 8], [17, 17]]
    lines = [json.loads(line) for line in (run_dir / "pretrain" / "anomalies.jsonl").read_text().splitlines()]
    assert [(line["step"], line["policy"]) for line in lines] == [(8, "rollback"), (17, "skip")]
    assert all(key.startswith("train-") for key in lines[0]["samples"])
    assert len(lines[0]["samples"]) == 80

    other = livt.folder / "stopped and killed"
    run(livt, other, "nan:8", "SIGUSR2:7", expect=85, **every)  # its checkpoint of 7 steps is not rolled back to
    run(livt, other, "nan:8", "spike:17", "SIGKILL:12", expect=-9, **every)
    run(livt, other, "spike:17", **every)
    assert_same_pretraining(other, run_dir)


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_and_too_many_end_the_run_with_their_samples(livt):
    run_dir, skip = livt.folder / "run", {**ONE, "faults__on_non_finite": "skip", "checkpoint__every_steps": 1}
    faults = [f"nan:{step}" for step in (4, 9, 10, 11)]
    said = run(livt, run_dir, *faults, expect=1, faults__most_in_a_row=2, **skip)
    three, four, five = (saved(run_dir, step)[0]["model.patch_embed.proj.weight"] for step in (3, 4, 5))
    assert torch.equal(three, four)
    assert not torch.equal(four, five)
    assert "it would be the 3th step in a row that is skipped, more than faults.most_in_a_row" in said
    status = read_status(run_dir, "pretrain")
    assert status["state"] == "failed"
    assert "Samples of the batch: train-" in status["why"]
    run(livt, run_dir, *faults, faults__most_in_a_row=3, **skip)  # a fault's policy may change when the run goes on
    assert saved(run_dir, 18)[1]["not_taken"] == [[4, 4], [9, 11]]
