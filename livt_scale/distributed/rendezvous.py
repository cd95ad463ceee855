"""The rendezvous of a run's ranks: a store without entries of an earlier start, and the names of missing ranks.

torchrun restarts the ranks on the store of its agent. With torch 2.14 the addresses of ranks that are dead by then are
still there under the same names, and the new ones try to reach them: the restart fails ("Gloo connectFullMesh failed").
So the ranks first agree on a new random word, and use it as the prefix of all names.

    rank k   hello/k = n          n: a number that only this rank has, new at each start
    rank 0   answer/n = word      to each hello it sees, a dead rank's too
    rank k   ack/word/k           it has read the answer; rank 0 continues when all have

Every wait has a bound, and rank 0 can name who is missing.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous

from livt_scale.util.errors import RunError
from livt_scale.util.log import announced_wait

LOOK_S = 0.02
NAMED = 8


def meet(rank: int, world_size: int, *, timeout_s: float) -> Store:
    """The store of this start, over MASTER_ADDR and MASTER_PORT. RunError where not all come within `timeout_s`."""
    ends = time.monotonic() + timeout_s
    # The others announce their wait only until they reach rank 0: from then on it names who is missing.
    others = f"the other {world_size - 1} of {world_size} processes" if rank == 0 else "rank 0"
    where = f"at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        with announced_wait(f"{others} {where}, up to {timeout_s:g} s", every_rank=True):
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout_s)))
        with announced_wait(f"{others}, up to {timeout_s:g} s"):
            word = agree_on_word(store, rank, world_size, ends=ends)
    except dist.DistError as error:
        raise RunError(
            f"the {world_size} processes do not come together: {str(error).splitlines()[0]}",
            remedy="see which one did not start, and whether MASTER_ADDR and MASTER_PORT are reached from all nodes",
        ) from error
    fresh = dist.PrefixStore(f"livt/{word}", store)
    fresh.set_timeout(timedelta(seconds=timeout_s))
    return fresh


def agree_on_word(store: Store, rank: int, world_size: int, *, ends: float) -> str:
    """A word that is the same on all ranks and new; `ends`: until when, on `time.monotonic`'s clock."""
    if rank:
        number = secrets.token_hex(8)
        store.set(f"livt/hello/{rank}", number)
        _wait_for(store, f"livt/answer/{number}", ends=ends)
        word = store.get(f"livt/answer/{number}").decode()
        store.set(f"livt/ack/{word}/{rank}", "")
        return word
    word = secrets.token_hex(8)
    missing, answered = set(range(1, world_size)), set()
    while True:
        for other in sorted(missing):
            if store.check([f"livt/hello/{other}"]):
                number = store.get(f"livt/hello/{other}").decode()
                if number not in answered:
                    answered.add(number)
                    store.set(f"livt/answer/{number}", word)
        missing = {other for other in missing if not store.check([f"livt/ack/{word}/{other}"])}
        if not missing:
            return word
        if time.monotonic() > ends:
            named = ", ".join(map(str, sorted(missing)[:NAMED])) + (", …" if len(missing) > NAMED else "")
            raise RunError(
                f"{len(missing)} of {world_size} processes did not come to the start: rank {named}",
                remedy="see in their logs why; a node that is slow to start needs a longer parallel.timeout_s",
            )
        time.sleep(LOOK_S)


def _wait_for(store: Store, name: str, *, ends: float) -> None:
    while not store.check([name]):
        if time.monotonic() > ends:
            raise RunError(
                "rank 0 did not answer at the start", remedy="see its log; it names the ranks that it waited for"
            )
        time.sleep(LOOK_S)
