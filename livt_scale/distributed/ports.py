"""The port at which the ranks of a Slurm job meet: from the job's number, so that all of them derive the same one.

    port_of_job(77)     12077
    free_port(77)       12077; where that is taken, another one that is free on this node

From 12000 to 31999: below 32768, from where Linux takes the ports of outgoing connections.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

FIRST, COUNT = 12_000, 20_000
STRIDE = 7919  # a prime: the next one tried is not that of the next job
TRIES = 50


def port_of_job(job: int) -> int:
    return FIRST + job % COUNT


def is_free(port: int) -> bool:
    """Whether a process of this node can listen there, on all its addresses as torch's store does."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a store has left in TIME_WAIT is free
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def free_port(job: int, *, is_free: Callable[[int], bool] = is_free) -> int | None:
    """The port of `job`, or the first of TRIES others that is free; None: none of them is."""
    ports = (port_of_job(job + STRIDE * k) for k in range(TRIES + 1))
    return next((port for port in ports if is_free(port)), None)
