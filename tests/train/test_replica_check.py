"""Replicas are compared bit for bit; the ranks that differ are named, and no others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from livt_scale.train.replica_check import digest_of, odd_ranks, shard_index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_one_changed_bit_changes_thedigest_of(dtype):
    for shape in ((), (1,), (5, 3)):
        tensor = torch.ones(shape, dtype=dtype)
        before = digest_of(tensor)
        assert digest_of(tensor.clone()) == before
        raw = tensor.view(-1)[-1:].view(torch.uint8)
        raw[0] ^= 1
        assert digest_of(tensor) != before


def test_the_odd_one_out_is_named_and_of_a_tie_all():
    assert odd_ranks([[0, 7], [0, 7], [0, 7]]) == []
    assert odd_ranks([[0, 7], [0, 8], [0, 7]]) == [1]
    assert odd_ranks([[0, 7], [0, 8]]) == [0, 1]
    assert odd_ranks([[0, 7], [0, 8], [0, 9], [0, 7]]) == [1, 2]


def test_only_ranks_with_the_same_share_are_compared():
    assert odd_ranks([[0, 7], [1, 8], [2, 9]]) == []  # sharded over all
    assert odd_ranks([[0, 7], [1, 8], [0, 7], [1, 9]]) == [1, 3]  # two nodes, two shards each


@pytest.mark.parametrize("rank", range(4))
def test_a_shard_that_is_copied_over_nodes_is_compared_with_its_copies(rank):
    """Two nodes of two ranks: 0 and 2 hold the one half, 1 and 3 the other."""
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
        assert shard_index(DTensor.from_local(torch.ones(2), mesh, [Replicate(), Shard(0)])) == rank % 2
        assert shard_index(torch.ones(2)) == 0
        flat = init_device_mesh("cpu", (4,))
        assert shard_index(DTensor.from_local(torch.ones(2), flat, [Shard(0)])) == rank
    finally:
        dist.destroy_process_group()
