"""Ranks agree on a word that no earlier start knew, on a store that is full of what such a start left."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from livt_scale.distributed.rendezvous import agree_on_word
from livt_scale.util.errors import RunError


def all_meet(store, world_size: int, *, late: float = 0.0) -> list[str]:
    words: dict[int, str] = {}

    def one(rank: int) -> None:
        time.sleep(late * rank)
        words[rank] = agree_on_word(store, rank, world_size, ends=time.monotonic() + 20)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return [words[rank] for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_each_start_has_a_word_of_its_own_that_all_ranks_know(world_size):
    store = dist.HashStore()
    starts = [all_meet(store, world_size, late=late) for late in (0.0, 0.05, 0.0)]
    assert all(len(set(words)) == 1 for words in starts)
    assert len({words[0] for words in starts}) == 3


def test_the_hello_of_a_rank_that_died_before_the_restart_is_taken_by_nobody():
    store = dist.HashStore()
    store.set("livt/hello/1", "of-the-dead")
    assert len(set(all_meet(store, 2, late=0.1))) == 1


def test_who_does_not_come_is_named_within_the_bound():
    store = dist.HashStore()
    store.set("livt/hello/2", "of-the-dead")
    with pytest.raises(RunError, match="3 of 4 processes did not come to the start: rank 1, 2, 3"):
        agree_on_word(store, 0, 4, ends=time.monotonic() + 0.2)
    with pytest.raises(RunError, match="rank 0 did not answer"):
        agree_on_word(dist.HashStore(), 1, 4, ends=time.monotonic() + 0.2)
