"""How many sockets a rank opens, counted in forked gloo ranks, against the formula; and the limit of open files."""

from __future__ import annotations

import json
import resource

import pytest

from livt_scale.distributed import process_setup
from livt_scale.distributed.flight_recorder import OLD_SIZE, SIZE
from livt_scale.distributed.process_setup import LAZY, LAZY_FROM, max_ranks, raise_open_files, set_up_process, sockets
from tests import warm

RANKS = 5
COUNT = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
import torch
import torch.distributed as dist
from livt_scale.distributed.collectives import Peers
from livt_scale.distributed.world import detect, process_group

def open_sockets():
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found

world, before = detect(), open_sockets()
with process_group(world, timeout_s=60):
    own = Peers.of_world(world.rank, world.world_size)
    for peers in (world.peers, own):
        peers.all_gather(1), peers.gather(1), peers.broadcast(1), peers.on_rank0(lambda: 1)
        peers.scatter(list(range(world.world_size)))
    dist.all_reduce(torch.ones(3))
    dist.barrier()
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(open_sockets() - before))
    dist.barrier()
"""


def counted(folder, *, lazy: str) -> list[int]:
    script = folder / "count.py"
    script.write_text(COUNT)
    warm.run([script, folder], ranks=RANKS, check=True, timeout=120, env={LAZY: lazy})
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_a_rank_opens_as_many_sockets_as_the_formula_has(tmp_path):
    assert counted(tmp_path, lazy="0") == [sockets(RANKS, rank=rank, lazy=False) for rank in range(RANKS)]


def test_with_lazy_connections_it_opens_fewer(tmp_path):
    found = counted(tmp_path, lazy="1")
    assert all(count <= sockets(RANKS, rank=rank, lazy=True) for rank, count in enumerate(found))
    assert sum(found) < sum(sockets(RANKS, rank=rank, lazy=False) for rank in range(RANKS))


def test_thousands_of_ranks_fit_an_ordinary_limit_of_open_files():
    assert sockets(4096, rank=1) < 64
    assert max_ranks(65536) > 20000
    for limit in (1024, 65536):
        ranks = max_ranks(limit)
        assert sockets(ranks, rank=0) <= limit - process_setup.OTHER_FILES < sockets(ranks + 1, rank=0)


@pytest.mark.parametrize(
    ("ranks", "before", "after"),
    [
        (1, {}, {}),
        (2, {}, {SIZE: "2000"}),
        (2, {SIZE: "0"}, {SIZE: "0"}),
        (2, {OLD_SIZE: "9"}, {OLD_SIZE: "9"}),
        (LAZY_FROM - 1, {}, {SIZE: "2000"}),
        (LAZY_FROM, {}, {SIZE: "2000", LAZY: "1"}),
        (LAZY_FROM, {LAZY: "0"}, {SIZE: "2000", LAZY: "0"}),
    ],
)
def test_collectives_are_recorded_and_many_ranks_connect_lazily_unless_the_user_says_otherwise(ranks, before, after):
    environ = dict(before)
    set_up_process(ranks, environ)
    assert environ == after


def test_the_limit_of_open_files_is_raised_to_the_hard_one():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        limit = raise_open_files()
        assert limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert limit == min(before[1], process_setup.MAX_OPEN_FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
