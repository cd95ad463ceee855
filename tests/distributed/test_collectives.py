"""One rank's failure is that of all; alone, each call is the identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from livt_scale.distributed.collectives import Peers
from livt_scale.util.errors import CheckpointError, DataError
from tests import warm

TWO_RANKS = """
import sys
from pathlib import Path
import torch.distributed as dist
from livt_scale.util.errors import CheckpointError, DataError
from livt_scale.distributed.collectives import Peers
from livt_scale.distributed.world import detect, process_group

world = detect()
told = []

def on_rank_1():
    if world.rank == 1:
        raise DataError(["no shard", "no list"], remedy="look there")

def a_bug_on_rank_0():
    if world.rank == 0:
        raise KeyError("a bug")

def note(peers, call):
    try:
        told.append(repr(call(peers)))
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}".replace("\\n", " and "))

with process_group(world, timeout_s=60):
    own = Peers.of_world(world.rank, 2, all_raise=CheckpointError)
    for peers in (world.peers, own):
        note(peers, lambda p: p.run_all(on_rank_1))
        note(peers, lambda p: p.run_all(a_bug_on_rank_0))
        note(peers, lambda p: p.on_rank0(a_bug_on_rank_0))
        note(peers, lambda p: p.on_rank0(lambda: world.rank))
        note(peers, lambda p: (p.all_gather(p.rank), p.gather(p.rank), p.scatter([5, 6]), p.broadcast("x")))
    apart = Peers.of_ranks(world.rank, [[1], [0]])
    note(apart, lambda p: (p.world_size, p.leads, p.all_gather(world.rank)))
    own.close()
Path(sys.argv[1], f"rank {world.rank}").write_text("\\n".join(told))
"""


def test_two_ranks_fail_together_and_say_who_it_was(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    warm.run([script, tmp_path], ranks=2, check=True, timeout=120)
    told = [Path(tmp_path, f"rank {rank}").read_text().split("\n") for rank in (0, 1)]
    assert told[0] == [
        "DataError: rank 1: no shard and no list. Look there",
        "KeyError: 'a bug'",  # its own, with its traceback
        "KeyError: 'a bug'",
        "0",
        "([0, 1], [0, 1], 5, 'x')",
        "DataError: rank 1: no shard and no list. Look there",
        "CheckpointError: rank 0: KeyError: 'a bug'",
        "CheckpointError: KeyError: 'a bug'",
        "0",
        "([0, 1], [0, 1], 5, 'x')",
        "(1, True, [0])",
    ]
    assert told[1] == [
        "DataError: no shard and no list. Look there",
        "LivtError: rank 0: KeyError: 'a bug'",
        "LivtError: KeyError: 'a bug'",
        "0",
        "([0, 1], None, 6, 'x')",
        "DataError: rank 1: no shard and no list. Look there",
        "CheckpointError: rank 0: KeyError: 'a bug'",
        "CheckpointError: KeyError: 'a bug'",
        "0",
        "([0, 1], None, 6, 'x')",
        "(1, True, [1])",
    ]


def fail(error: Exception):
    def work():
        raise error

    return work


def test_alone_each_call_is_the_identity_and_errors_are_ones_own():
    alone = Peers()
    assert alone.run_all(lambda: 3) == alone.on_rank0(lambda: 3) == alone.broadcast(3) == alone.scatter([3]) == 3
    assert (alone.all_gather(3), alone.gather(3)) == ([3], [3])
    alone.close()
    for peers in (alone, Peers(all_raise=CheckpointError)):
        with pytest.raises(DataError, match="no shard"):
            peers.run_all(fail(DataError("no shard")))
        with pytest.raises(ZeroDivisionError):
            peers.on_rank0(fail(ZeroDivisionError()))
    with pytest.raises(PermissionError):
        alone.run_all(fail(PermissionError(13, "no")))
    with pytest.raises(CheckpointError, match="PermissionError"):
        Peers(all_raise=CheckpointError).run_all(fail(PermissionError(13, "no")))
