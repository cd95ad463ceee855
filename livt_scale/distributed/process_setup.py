"""What a process sets before it joins a process group: open files, how gloo connects, the record of collectives.

    sockets(8, rank=1)          17 = 1 to the store of rank 0 + for each of 2 groups 7 peers and 1 that listens
    sockets(512, rank=0)        1538; with lazy connections, of which most pairs of ranks need none, fewer

By default gloo connects each rank with each other one, in each group. From LAZY_FROM ranks on they connect when they
first exchange something (`TORCH_GLOO_LAZY_INIT`): rings and trees then need about 2 · log2(ranks) connections. Not in
small runs, because a rank that is lost before its first exchange is not noticed by gloo then, whatever the time-out is
(pytorch/gloo#520, seen with torch 2.14.1): only the watchdog ends its peers.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import MutableMapping
from contextlib import suppress

from livt_scale.distributed import flight_recorder

GROUPS = 2  # of gloo: the process group of the training, and the one of the thread that saves
LAZY_FROM = 128  # ranks
LAZY = "TORCH_GLOO_LAZY_INIT"
MAX_OPEN_FILES = 65536  # no more is needed, and some programs close each number up to the limit when they start
OTHER_FILES = 256  # shards, loader processes, logs


def set_up_process(world_size: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Call before the process group is made. A variable that is set already is kept."""
    raise_open_files()
    if world_size > 1:
        flight_recorder.set_size(environ)
    if world_size >= LAZY_FROM:
        environ.setdefault(LAZY, "1")


def raise_open_files() -> int:
    """Raise the limit of open files to the hard one, at most MAX_OPEN_FILES. Returns the limit."""
    soft, hard = open_files()
    wanted = min(hard, MAX_OPEN_FILES)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return wanted
    return soft


def open_files() -> tuple[int, int]:
    """The soft and the hard limit of open files of this process; MAX_OPEN_FILES for no limit."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, hard


def sockets(world_size: int, *, rank: int, groups: int = GROUPS, lazy: bool | None = None) -> int:
    """Sockets of a rank whose launcher has no store: exactly, or with `lazy` at most. lazy: None: by the size."""
    lazy = world_size >= LAZY_FROM if lazy is None else lazy
    store = world_size + 2 if rank == 0 else 1  # rank 0 listens, and is a client of its own
    peers = world_size - 1
    if lazy and rank:  # rank 0 gathers and scatters: it may reach all
        peers = min(peers, 2 * math.ceil(math.log2(world_size)) + 3)  # a tree, a barrier, a ring, rank 0
    return store + groups * (peers + 1)


def max_ranks(open_files: int) -> int:
    """How many ranks a limit of open files is enough for, on rank 0, which has the most.

    >>> max_ranks(1024)
    255
    """
    return (open_files - OTHER_FILES - 2) // (GROUPS + 1)
