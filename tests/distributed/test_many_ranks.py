"""Worlds larger than a test machine: 64 ranks of which one is real, and 32 real ones forked from one process."""

from __future__ import annotations

import json

import pytest

from tests import warm
from tests.distributed import fake_world
from tests.distributed.strategies import SMALL, Job, Kind, train_all

pytestmark = pytest.mark.slow
SEVEN_STEPS = {
    **SMALL,
    "stages.finetune.micro_batch": 32,
    "stages.*.global_batch": 96,
    "stages.pretrain.micro_batch": 3,
}


def test_a_step_of_64_ranks_exchanges_what_its_strategy_needs(tmp_path):
    """Both stages under bf16 and fp16, recomputation, clipping and an average of the weights."""
    done = warm.run([fake_world.__file__, "64", "8"], check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found) == 8
    for name, counts in found.items():
        units = 7 if "pretrain" in name else 5  # a block each, 2 of them the decoder's, and the rest
        assert counts["_reduce_scatter_base_"] == units, name  # once for two micro-batches
        assert counts.get("allreduce_", 0) >= units * ("node" in name), name  # between the nodes' copies


def test_a_checkpoint_of_32_hybrid_ranks_goes_on_on_3(tmp_path):
    alone = Job(Kind("ddp", 1), tmp_path / "alone", "pretrain", {**SEVEN_STEPS, "stages.pretrain.micro_batch": 32})
    many = Job(
        Kind("fsdp", 32, options=(("shard_within", "node"),), local=8), tmp_path / "many", "pretrain", SEVEN_STEPS
    )
    train_all([alone, many], tmp_path)
    assert many.losses == pytest.approx(alone.losses, rel=1e-4)
    again = Job(Kind("fsdp", 3), tmp_path / "three", "pretrain", alone.sets, many.checkpoint(5))
    train_all([again], tmp_path)
    assert again.losses == pytest.approx(alone.losses[5:], rel=1e-4)
