"""What tests of remote sets share: short waits, a cache of the test's own, no settings of the user's, a small set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from livt_scale.data.remote import fetch
from livt_scale.data.shard_set import ShardSet
from tests.data.remote.flaky_server import FlakyServer
from tests.data.tiny_sets import tiny_set

TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT_S", 0.001)
    for name in os.environ:
        if "proxy" in name.lower() or name.startswith("AWS_") or name in TRUST:
            monkeypatch.delenv(name)
    monkeypatch.setenv("LIVT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """43 images in 11 shards. Read only."""
    return tiny_set(tmp_path_factory.mktemp("sets") / "local", num_samples=43, per_shard=4)


@pytest.fixture
def server(local: ShardSet) -> Iterator[FlakyServer]:
    with FlakyServer(local.folder) as running:
        yield running
