"""Fixtures of whole runs: a runner, and a run that nothing disturbed."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.whole_runs import Livt


@pytest.fixture
def livt(tmp_path: Path) -> Livt:
    return Livt(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages that nothing disturbed. Read only: the test processes of one `pytest -n` share it."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "finished"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            Livt(folder).train(folder / "run")
            (folder / "made").touch()
    return folder / "run"
