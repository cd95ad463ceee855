"""Where no cluster can be started, the tests that need one say why, and are skipped."""

import os

from tests.slurm_real import cluster


def test_without_root_or_a_daemon_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "needs root" in cluster.why_not()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cluster, "which", lambda name: None if name in ("munged", "sacctmgr") else f"/usr/sbin/{name}")
    assert cluster.why_not() == (
        "not installed: munged, sacctmgr (apt-get install slurm-wlm slurmdbd munge mariadb-server)"
    )
    monkeypatch.setattr(cluster, "which", lambda name: f"/usr/sbin/{name}")
    assert cluster.why_not() is None
