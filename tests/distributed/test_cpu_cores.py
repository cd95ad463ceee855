"""A rank's share of cores: bound to its own by srun, or sharing all with the others, on one machine or several."""

from __future__ import annotations

import os
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.data import num_workers
from livt_scale.distributed.cpu_cores import share
from tests import warm
from tests.whole_runs import free_port

MASK = st.frozensets(st.integers(0, 15), min_size=1)


def spans(*ends: tuple[int, int]) -> list[frozenset[int]]:
    return [frozenset(range(low, high)) for low, high in ends]


@pytest.mark.parametrize(
    ("masks", "shares"),
    [
        (spans((0, 16)), [16]),
        (spans(*[(0, 16)] * 4), [4, 4, 4, 4]),  # torchrun: all may use all
        (spans((0, 4), (4, 8), (8, 12), (12, 16)), [4, 4, 4, 4]),  # srun --cpus-per-task=4 binds each to its own
        (spans((0, 8), (0, 8), (8, 16), (8, 16)), [4, 4, 4, 4]),  # two ranks a socket
        (spans((0, 2), (2, 16)), [2, 14]),
        (spans((0, 8), (4, 12)), [6, 6]),
        (spans(*[(0, 2)] * 5), [1] * 5),  # more ranks than cores
    ],
)
def test_each_core_is_divided_among_the_ranks_that_may_use_it(masks, shares):
    assert [share(own, masks) for own in masks] == shares


@given(masks=st.lists(MASK, min_size=1, max_size=8))
def test_the_shares_never_exceed_the_cores_but_for_one_that_each_rank_needs(masks):
    shares = [share(own, masks) for own in masks]
    assert all(1 <= n <= len(own) for n, own in zip(shares, masks, strict=True))
    assert sum(n for n in shares if n > 1) <= len(frozenset().union(*masks))
    exact = [sum(Fraction(1, sum(c in m for m in masks)) for c in own) for own in masks]
    assert all(n > e - 1 for n, e in zip(shares, exact, strict=True))


RANK = """
import os, sys
from pathlib import Path
rank = int(os.environ["RANK"])
masks, boot_ids = eval(sys.argv[1]), sys.argv[2:]
os.sched_getaffinity = lambda _: masks[rank]
from livt_scale.data import num_workers
from livt_scale.distributed import cpu_cores, world as worlds
if boot_ids:
    cpu_cores.BOOT_ID = Path(boot_ids[rank])
world = worlds.detect()
with worlds.process_group(world, timeout_s=60), cpu_cores.share_with_loader(world):
    seen = num_workers.cores_for_rank(world.local_size)
print(rank, seen, num_workers.cores_for_rank(world.local_size), flush=True)
"""


@pytest.mark.parametrize(
    ("masks", "machines", "shares"),
    [
        ("[set(range(8)), set(range(8, 16))]", "", [8, 8]),  # bound: not divided again
        ("[set(range(16))] * 2", "", [8, 8]),  # one machine, whatever it calls itself
        ("[set(range(16))] * 2", "ab", [16, 16]),  # the same numbers, on two machines
    ],
)
def test_two_ranks_tell_each_other(masks, machines, shares, tmp_path):
    boot_ids = [tmp_path / name for name in machines]
    for path in boot_ids:
        path.write_text(path.name)
    port, ranks = str(free_port()), []
    for rank in range(2):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environ = os.environ | told | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(warm.Popen(["-c", RANK, masks, *boot_ids], env=environ, stdout=warm.PIPE))
    said = [process.communicate(timeout=120)[0].split() for process in ranks]
    alone = len(eval(masks)[0]) // 2  # afterwards it is a guess again
    assert said == [["0", str(shares[0]), str(alone)], ["1", str(shares[1]), str(alone)]]


def test_what_was_told_ends_with_its_block():
    with num_workers.cores_are(7):
        with num_workers.cores_are(3):
            assert num_workers.cores_for_rank(8) == 3
        assert num_workers.cores_for_rank(8) == 7
    assert num_workers.cores_for_rank(10**6) == 1
