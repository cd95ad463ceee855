"""The port of a job: the same on all ranks, out of the way of Linux's own, and another one where it is taken."""

import socket

from hypothesis import given
from hypothesis import strategies as st

from livt_scale.distributed.ports import free_port, is_free, port_of_job

EPHEMERAL = 32768  # net.ipv4.ip_local_port_range of Linux


@given(st.integers(0, 2**32))
def test_ports_are_neither_reserved_nor_those_of_outgoing_connections(job):
    assert 1024 < port_of_job(job) < EPHEMERAL


@given(st.integers(0, 2**32), st.sets(st.integers(0, 30)))
def test_the_first_free_one_is_taken_and_none_of_those_of_the_jobs_beside_it(job, taken_tries):
    tried: list[int] = []

    def is_free(port: int) -> bool:
        tried.append(port)
        return len(tried) - 1 not in taken_tries

    port = free_port(job, is_free=is_free)
    assert port == tried[-1]
    assert tried[0] == port_of_job(job)
    assert len(set(tried)) == len(tried)
    assert not {port_of_job(job + k) for k in (-2, -1, 1, 2)} & set(tried)


def test_where_none_is_free_there_is_none():
    assert free_port(77, is_free=lambda port: False) is None


def test_a_port_on_which_somebody_listens_is_taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not is_free(port)
    assert is_free(port)
