"""One checkpoint, any world size: saved by one process and loaded by two, sharded or not, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from livt_scale.checkpoint.load import Position, Saver, list_checkpoints, load, newest_whole
from livt_scale.distributed.state_dict import collect, restore
from tests.checkpoint.test_node_local import run_ranks
from tests.scripts import load_script

RANKS = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def ranks():
    return load_script(RANKS)


def test_two_ranks_and_one_read_each_others_checkpoints(tmp_path, ranks):
    model, optimizer = ranks.build(1)
    ranks.train(model, optimizer, 5)
    with Saver(tmp_path / "alone", mode="sync") as saver:
        saver.save(collect(model, optimizer), position=Position(0, 5), facts={"strategy": "plain"})

    run_ranks(RANKS, tmp_path, 2)

    path = newest_whole(tmp_path / "sharded")
    model, optimizer = ranks.build(9)
    into = collect(model, optimizer)
    manifest = load(path, into)
    restore(model, optimizer, into)
    expected = load_file(tmp_path / "expected.safetensors")
    assert collect(model, optimizer).keys() == expected.keys()
    for name, tensor in collect(model, optimizer).items():
        assert torch.equal(tensor, expected[name]), name
    assert manifest["world_size"] == 2
    assert [info.whole for info in list_checkpoints(tmp_path / "sharded")] == [True]
