"""The descriptions of clusters, without starting one."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.slurm_real.descriptions import CLUSTERS, FOR_ALL_TESTS, TWO_NODES

JOBS = 1000  # more than the tests of a day submit to one cluster


def conf(name):
    """The lines of a cluster's slurm.conf as (keyword, value)."""
    description = CLUSTERS[name]
    ports = {daemon: 7000 + k for k, daemon in enumerate(("ctld", "dbd", *description.nodes))}
    text = description.slurm_conf(Path("/cluster"), "here", ports)
    assert text.endswith("\n")
    return [tuple(line.split("=", 1)) for line in text.splitlines()]


def test_clusters_that_run_at_the_same_time_number_their_jobs_apart():
    first = sorted(description.first_job for description in CLUSTERS.values())
    assert len(set(CLUSTERS.values())) == len(CLUSTERS)
    assert all(later - earlier >= JOBS for earlier, later in pairwise(first))


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_slurm_conf_sets_each_option_once_and_has_all_nodes_and_partitions(name):
    description, lines = CLUSTERS[name], conf(name)
    several = ("NodeName", "PartitionName")
    options = [keyword for keyword, _ in lines if keyword not in several]
    assert len(set(options)) == len(options)
    assert all(re.fullmatch(r"[A-Za-z]+", keyword) for keyword, _ in lines)
    values = dict(line for line in lines if line[0] not in several)
    assert not any(re.search(r"[{}\s]", value) for value in values.values()), values
    assert values["PreemptMode"] == description.preempt
    assert values["FirstJobId"] == str(description.first_job)
    assert ("AccountingStorageEnforce" in values) == description.accounting
    assert ("DefMemPerCPU" in values) == (values["SelectTypeParameters"] == "CR_CPU_Memory")
    named = {keyword: [value.split()[0] for k, value in lines if k == keyword] for keyword in several}
    assert named["NodeName"] == list(description.nodes)
    assert named["PartitionName"] == [partition.name for partition in description.partitions]
    assert [value.endswith("Default=YES") for k, value in lines if k == "PartitionName"].index(True) == 0


def test_what_all_tests_run_on_has_the_partitions_and_nodes_that_they_name():
    for description in FOR_ALL_TESTS.values():
        assert [p.name for p in description.partitions] == [p.name for p in TWO_NODES.partitions]
        assert {"spare": "REQUEUE", "scrap": "CANCEL", "urgent": "OFF"}.items() <= {
            p.name: p.preempt for p in description.partitions
        }.items()
        assert description.nodes[:2] == TWO_NODES.nodes
